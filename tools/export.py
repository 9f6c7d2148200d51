"""A trained encoder as a folder that timm loads: `python tools/export.py RUN --out DIR --license NAME`.

DIR gets model.safetensors, config.json and README.md, the model card. It loads with
`timm.create_model("local-dir:DIR", pretrained=True)` and no code of this project. docs/use.md shows the other formats.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from pipeline.shards.manifest import read_as_expected, read_object
from pipeline.text import markdown_table
from train.command import CommandParser, path_argument, run_command
from train.config.schema import Config
from train.output.display import LOADING
from train.output.report import read_summary, summary_rows

# The hub's names, first the one that is suggested; any other is a name of its `other`.
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "other")
REMEDY = "Run the command that wrote it again"
WEIGHTS, SETTINGS, README = "model.safetensors", "config.json", "README.md"
FILES = {WEIGHTS, SETTINGS, README, "model.onnx", "model.onnx.data", "transformers"}  # .data: of weights above 1.5 GB
CARD = Path(__file__).parent / "exporting" / "card"


def timm_settings(width: int, config: Config) -> dict[str, Any]:
    """Return what timm needs to build an encoder of this width and to prepare an image as the evaluation does."""
    size, pixels = config.data.multicrop.global_crop_size, config.data.augmentation
    return {
        "architecture": config.model.encoder.partition(".")[0], "num_classes": 0, "num_features": width,
        "global_pool": "avg",  # as in every evaluation
        "model_args": {**config.model.encoder_kwargs, "global_pool": "avg"},
        "pretrained_cfg": {
            "tag": config.logging.run_name, "input_size": [3, size, size], "interpolation": "bilinear",
            "crop_pct": config.evaluation.crop_ratio, "mean": list(pixels.mean), "std": list(pixels.std),
            "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def model_card(config: Config, checkpoint: Path, licence: str, args: argparse.Namespace) -> str:
    """Return README.md: how to load the encoder, its data, training, scores, settings and licence."""
    from train.checkpoint import checkpoint_step
    from train.evaluation.offline import report_table

    sizes, pixels, (num_global, num_local) = config.data.multicrop, config.data.augmentation, config.data.crop_counts
    card = (CARD / "timm.md").read_text().format(
        place=f"hf-hub:{args.hub}" if args.hub else "local-dir:PATH_OF_THIS_FOLDER", config=config,
        licence=licence if licence in LICENCES else f"other\nlicense_name: {licence}",
        local_crops=f" and {num_local} local crops of {sizes.local_crop_size} px" if num_local else "", num_global=num_global,
        steps=checkpoint_step(checkpoint), mean=list(pixels.mean), std=list(pixels.std),
    )  # fmt: skip
    card += "".join((CARD / f"{name}.md").read_text() for name in ("onnx", "transformers") if getattr(args, name))
    if (summary := checkpoint.resolve().parent.parent / "summary.json").exists():
        card += f"\n## Training\n\n{markdown_table(('', ''), summary_rows(read_summary(summary)))}\n"
    if args.figures is not None:
        content = read_object(args.figures, REMEDY)
        with read_as_expected(args.figures, REMEDY):
            card += f"\n## Evaluation\n\n{report_table(content)}\n"
    if config.model.weights is not None:
        card += f"\nTraining started from the weights `{config.model.weights}`, whose licence also binds these. Both "
        card += "are mixed where that gave the better k-NN.\n"
    return f"{card}\n## Settings\n\n```yaml\n{config.to_yaml().rstrip()}\n```\n\n## Licence\n\n{licence}\n"


def chosen_licence(theirs: str | None, weights: str | None) -> str:
    """Return the licence of the starting weights, or what a person answers. Raises ValueError where nobody can be asked."""
    if theirs is not None:
        print(f"licence: {theirs}, that of {weights}; --license names another")
        return theirs
    suggested = "" if weights else LICENCES[0]
    if sys.stdin.isatty():
        print(f"licence of the exported weights{suggested and f' [{suggested}]'}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()  # empty at the end of the input, as with Ctrl-D
        if answer := line and (line.strip() or suggested):
            return answer
    reason = f"that of {weights} is not known" if weights else "nobody else can choose it"
    raise ValueError(f"the exported weights need a licence, and {reason}: add --license {LICENCES[0]}, or another")


def export(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError for missing files and ValueError for wrong ones."""
    out = args.out.absolute()
    if out.exists() and {path.name for path in out.iterdir()} - FILES:
        raise ValueError(f"{args.out}: holds other files; name a new folder with --out")
    print(LOADING, file=sys.stderr)
    import timm
    import torch
    from safetensors.torch import save

    from tools.exporting.formats import write_onnx, write_transformers
    from train.adapt.weights import run_licence
    from train.evaluation.offline import find_checkpoint, load_trained

    checkpoint, config = find_checkpoint(args.run, args.config)
    licence = args.license or chosen_licence(run_licence(checkpoint.resolve().parent.parent, config), config.model.weights)
    card = model_card(config, checkpoint, licence, args)
    target = load_trained(checkpoint, config, torch.device("cpu")).target
    settings = timm_settings(target.width, config)
    state = {name: value.contiguous() for name, value in target.vit.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch)
        write_atomic(folder / WEIGHTS, save(state))  # save_file would write for this user alone, whatever the umask says
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        (folder / README).write_text(card)
        vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # as everybody will
        if args.onnx:
            write_onnx(vit, config.data.multicrop.global_crop_size, folder)
        if args.transformers:
            write_transformers(vit, settings["pretrained_cfg"], folder)
        out.mkdir(exist_ok=True)
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in folder.iterdir():
            path.rename(out / path.name)
    if args.hub:
        upload(out, args, licence)
    print(f'exported; load it with timm.create_model("local-dir:{args.out}", pretrained=True)')


def upload(folder: Path, args: argparse.Namespace, licence: str) -> None:
    """Print what goes to the hub, and upload it if a person has confirmed it. Raises ValueError if the hub does not take it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    hub, kind = HfApi(), "public" if args.public else "private"
    print(f"{'uploading' if args.yes else 'would upload'} to {args.hub}, {kind}, licence {licence}:")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes")
    if not args.yes:
        print("nothing was uploaded; add --yes to upload this")
        return
    try:
        hub.create_repo(args.hub, private=not args.public, exist_ok=True)
        if not args.public and not hub.model_info(args.hub).private:
            raise ValueError(f"{args.hub}: is there already, and public; add --public, or name another")
        earlier = ["model.onnx*", "transformers/*"]  # which this export need not have
        print(f"uploaded: {hub.upload_folder(repo_id=args.hub, folder_path=folder, delete_patterns=earlier)}")
    except HTTPError as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{args.hub}: {reason}; `hf auth login` or HF_TOKEN names you to the hub") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="export", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("run", type=path_argument, help="The folder of a run, whose newest checkpoint is exported, or one of its checkpoints.")
    add("--out", type=path_argument, required=True, metavar="DIR",
        help="The folder to create. An earlier export there is replaced; one with other files is refused.")  # fmt: skip
    add("--config", type=path_argument, help="The settings of the checkpoint. The default is config.yaml of its run.")
    add("--figures", type=path_argument, metavar="JSON", help="The output of train.evaluate --json, for the model card.")
    add("--license", help="The licence of the weights. The default is that of model.weights; a terminal is asked.")
    add("--onnx", action="store_true", help="Write model.onnx too, for any number of images, and compare it with torch.")
    add("--transformers", action="store_true", help="Write a folder `transformers`, which transformers' AutoModel loads.")
    add("--hub", metavar="OWNER/NAME", help="Show what would be uploaded to this repository of the Hugging Face hub.")
    add("--yes", action="store_true", help="Upload it. A new repository is private.")
    add("--public", action="store_true", help="Make a new repository public.")
    args = parser.parse_args(arguments)
    if args.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.hub):
        parser.error(f"--hub {args.hub}: write OWNER/NAME")
    return run_command("export", lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
