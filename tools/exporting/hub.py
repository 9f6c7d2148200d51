"""An export on the Hugging Face hub, where a person has confirmed it."""

from pathlib import Path


def upload(folder: Path, repository: str, licence: str, public: bool, confirmed: bool) -> None:
    """Print what goes into `OWNER/NAME`, and upload it if `confirmed`. Raises ValueError if the hub does not take it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    kind = "public" if public else "private"
    print(f"{'uploading' if confirmed else 'would upload'} to {repository}, {kind}, licence {licence}:")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes")
    if not confirmed:
        print("nothing was uploaded; add --yes to upload this")
        return
    hub = HfApi()
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        if not public and not hub.model_info(repository).private:
            raise ValueError(f"{repository}: is there already, and public; add --public, or name another")
        earlier = ["model.onnx*", "transformers/*"]  # which this export need not have
        print(f"uploaded: {hub.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=earlier)}")
    except HTTPError as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{repository}: {reason}; `hf auth login` or HF_TOKEN names you to the hub") from None
