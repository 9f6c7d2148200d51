"""A trained encoder as a folder that timm loads: `python tools/export.py RUN --out DIR [--figures JSON]`.

DIR gets model.safetensors, config.json and README.md, the model card. It loads with
`timm.create_model("local-dir:DIR", pretrained=True)` and no code of this project.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.shards.manifest import read_object
from train.command import run_command
from train.config.schema import Config
from train.output.display import LOADING, summary_rows

if TYPE_CHECKING:
    from model.encoder import MultiCropEncoder

WRITE_AGAIN = "Run the command again that wrote it"
WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"


def timm_settings(encoder: "MultiCropEncoder", config: Config) -> dict[str, Any]:
    """What timm needs to build the encoder and to prepare an image as the evaluation does."""
    size = config.data.multicrop.global_crop_size
    return {
        "architecture": config.model.encoder.partition(".")[0],
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "avg",  # as in every evaluation
        "model_args": {**config.model.encoder_kwargs, "global_pool": "avg"},
        "pretrained_cfg": {
            "tag": config.logging.run_name,
            "num_classes": 0,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": config.evaluation.crop_ratio,
            "crop_mode": "center",
            "mean": list(config.data.augmentation.mean),
            "std": list(config.data.augmentation.std),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def model_card(config: Config, checkpoint: Path, licence: str, summary: Path, figures: Path | None) -> str:
    """README.md: how to load it, what it was trained on and how, what was measured, and its licence."""
    from train.checkpoint import checkpoint_step
    from train.evaluation.offline import report_table

    data, (num_global, num_local) = config.data, config.data.crop_counts
    crops = f"{num_global} global crops of {data.multicrop.global_crop_size} px"
    if num_local:
        crops += f" and {num_local} local crops of {data.multicrop.local_crop_size} px"
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, self-supervised, jepa]",
        f"license: {licence}",
        "---",
        "",
        f"# {config.logging.run_name}",
        "",
        f"A `{config.model.encoder}` encoder, pretrained without labels by Multi-Crop H-JEPA: {crops}, masking strategy "
        f"`{config.masking.strategy}`. These are the weights of the moving-average encoder after "
        f"{checkpoint_step(checkpoint):,} steps.",
        "",
        "```python",
        "import timm",
        "",
        'encoder = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()',
        "features = encoder(images)  # mean of the patch tokens; forward_features(images) gives all tokens",
        "```",
        "",
        "`timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))` makes the images.",
        "",
        "## Data",
        "",
        f"`{data.dataset}`; pixels in 0..1 are normalised with mean {list(data.augmentation.mean)} and standard deviation "
        f"{list(data.augmentation.std)}. The data has its own licence.",
        "",
    ]
    if summary.exists():
        rows = [f"| {name} | {value} |" for name, value in summary_rows(read_object(summary, WRITE_AGAIN))]
        lines += ["## Training", "", "| | |", "|---|---|", *rows, ""]
    if figures is not None:
        lines += ["## Evaluation", "", report_table(read_object(figures, WRITE_AGAIN)), ""]
    lines += ["## Settings", "", "```yaml", config.to_yaml().rstrip(), "```", "", "## Licence", "", licence, ""]
    return "\n".join(lines)


def export(run: Path, out: Path, settings: Path | None, licence: str, figures: Path | None) -> None:
    """Raises FileNotFoundError for missing files and ValueError for wrong ones."""
    if out.exists() and {path.name for path in out.iterdir()} - {WEIGHTS, SETTINGS, CARD}:
        raise ValueError(f"{out}: holds other files; name a new folder with --out")
    print(LOADING, file=sys.stderr)
    import torch
    from safetensors.torch import save_file

    from train.build import build_model
    from train.checkpoint import load_checkpoint
    from train.evaluation.offline import find_checkpoint

    checkpoint, config = find_checkpoint(run, settings)
    model = build_model(config, torch.device("cpu"))
    load_checkpoint(checkpoint, model)
    summary = checkpoint.resolve().parent.parent / "summary.json"
    card = model_card(config, checkpoint, licence, summary, figures)
    out.mkdir(parents=True, exist_ok=True)
    encoder = model.target
    save_file({name: value.contiguous() for name, value in encoder.vit.state_dict().items()}, out / WEIGHTS)
    (out / SETTINGS).write_text(json.dumps(timm_settings(encoder, config), indent=2) + "\n")
    (out / CARD).write_text(card)
    print(f'exported; load it with timm.create_model("local-dir:{out}", pretrained=True)')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run", type=Path, help="The folder of a run, whose newest checkpoint is taken, or one of its checkpoints."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="The folder to make. It must not exist.")
    parser.add_argument(
        "--config", type=Path, help="The settings of the checkpoint. The default is config.yaml of its run."
    )
    parser.add_argument(
        "--figures", type=Path, metavar="JSON", help="What train.evaluate --json wrote; the model card then shows it."
    )
    parser.add_argument(
        "--license", default="apache-2.0", help="The licence of the weights. The default is %(default)s."
    )
    given = parser.parse_args(arguments)
    return run_command("export", lambda: export(given.run, given.out, given.config, given.license, given.figures))


if __name__ == "__main__":
    sys.exit(main())
