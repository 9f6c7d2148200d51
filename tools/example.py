"""A tour of the Python API, with pictures: photographs, shards, eight crops, three masking strategies, training, features.

`python tools/example.py` uses photographs from the scikit-image, scikit-learn and matplotlib packages and takes about a minute
on two CPU cores; `--data FOLDER` uses your own shards. Start reading at `tour`: your own script would do the same.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path

from train.command import CommandParser, path_argument, run_command
from train.output.display import LOADING

if __name__ == "__main__":
    print(LOADING, file=sys.stderr)

import torch
import webdataset
from PIL import Image

from model import MultiCropMaskGenerator
from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, default_levels
from model.losses import LossWeights, random_directions
from model.masks import STRATEGIES
from model.predictor import Predictor
from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.dataset import MultiCropDataset, resolve_device
from tools.shards.photographs import PHOTOGRAPHS, photograph_path
from train.optim import build_optimizer
from train.output import pictures

BATCH_SIZE, LR, EMA_MOMENTUM, SLICES, PROJECTOR = 6, 1e-3, 0.99, 64, 64
SOURCE_SIDE = 400  # pixels of the main picture of the overview
PRINT_EVERY = 20  # steps


def write_photographs(folder: Path) -> None:
    """Write a WebDataset: a JPEG and a class for each photograph, under one key. Any tool that writes tars will do."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(folder / "photographs-000000.tar")) as tar:
        for label, (package, file, _, _) in enumerate(PHOTOGRAPHS):
            picture = Image.open(photograph_path(package, file)).convert("RGB")
            tar.write({"__key__": f"{label:04d}", "jpg": picture, "cls": label})


def build_hjepa(dataset: MultiCropDataset) -> HJEPA:
    """Return a small model for 224 and 96 pixels, with three levels to predict."""
    encoder = MultiCropEncoder(
        "vit_tiny_patch16_dinov3_qkvb", [224, 96], mean=dataset.mean, std=dataset.std, depth=6, init_values=0.1
    )
    levels = default_levels(encoder.depth)
    return HJEPA(
        encoder, Predictor(encoder.width, 96, 2, 3, len(levels)), levels, num_global_crops=2, global_crop_size=224,
        projector_hidden=256, projector_dim=PROJECTOR, weights=LossWeights(),
    )  # fmt: skip


def train(model: HJEPA, dataset: MultiCropDataset, device: torch.device, steps: int) -> None:
    """Train as `python -m train.run` does, without its schedules, checkpoints and guards."""
    loader = build_multicrop_dataloader(dataset, min(BATCH_SIZE, len(dataset)))
    mask_gen = MultiCropMaskGenerator("global_only", num_global_crops=2, num_local_crops=6, device=device)
    optimizer = build_optimizer(model, 0.05, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = LR
    generator = torch.Generator(device)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), steps), 1):
        masks = mask_gen(batch_size=len(batch.labels))
        directions = random_directions(PROJECTOR, SLICES, generator, device)
        losses = model(batch.crops, batch.boxes, batch.flips, masks, directions)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(EMA_MOMENTUM)
        if step in (1, steps) or step % PRINT_EVERY == 0:
            print(f"  step {step}: " + ", ".join(f"{k} {v.item():.3f}" for k, v in losses.items() if v.ndim == 0))


def tour(data: Path | None, out: Path, steps: int) -> None:
    """Raises ValueError or OSError when the shards or the folder for the pictures cannot be used."""
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = out / "shards"
        write_photographs(data / "train")
    device = torch.device("cuda" if resolve_device("auto") == "gpu" else "cpu")

    dataset = build_multicrop_dataset("custom", data, num_global_crops=2, num_local_crops=6)
    print(f"1. data set: {len(dataset)} images in {data}")

    loader = build_multicrop_dataloader(dataset, batch_size=min(BATCH_SIZE, len(dataset)), shuffle=False)
    batch = next(iter(loader))
    crops, labels = batch.crops, batch.labels
    print(f"2. a batch: {len(crops)} crops, {[tuple(crop.shape) for crop in crops[1:3]]} ..., labels {labels.tolist()}")

    views, tiles = pictures.Views(batch, 2, dataset.mean, dataset.std), {}
    for strategy in STRATEGIES:
        torch.manual_seed(1)
        mask_gen = MultiCropMaskGenerator(strategy, num_global_crops=2, num_local_crops=6, device=device)
        masks = mask_gen(batch_size=len(labels))
        # The first global of the first image, what the encoder sees of it, and the cells to predict.
        tiles[strategy] = pictures.mask_tiles(views, masks, 0, 0, mask_gen.grid, mask_gen.strides)
        pictures.save_rows(out / f"{strategy}.png", [tiles[strategy]])
    print(f"3. masks: {', '.join(STRATEGIES)}")

    torch.manual_seed(0)
    model = build_hjepa(dataset).to(device)
    print(f"4. training, {steps} steps:")
    train(model, dataset, device, steps)

    # The image with its boxes at the left; its crops, the features of its target and the masks of its first global at the right.
    encoded = dataset.index.encoded(int(loader.rows_at(0, 0, 1)[0]))
    source = pictures.source_tile(views, 0, encoded, SOURCE_SIDE, " (dashed: flipped)")
    colours = pictures.to_picture(pictures.feature_colours(model.target, crops[0])[0])
    features = pictures.tile(colours, "its features, as colours", pictures.GLOBAL_SIDE)
    details = pictures.join_rows([pictures.crop_tiles(views, 0), [features, *tiles["global_only"][1:]]])
    pictures.save_rows(out / "overview.png", [[source, details]])
    print(f"5. pictures: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="example", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "The default is %(default)s."
    add("--data", type=path_argument, metavar="FOLDER", help="A folder with train/*.tar. The default is photographs.")
    add("--out", type=path_argument, default=Path("example"), help=f"The folder of the pictures. {default}")
    add("--steps", type=int, default=60, help=f"The number of training steps. {default}")
    args = parser.parse_args(arguments)
    return run_command("example", lambda: tour(args.data, args.out, args.steps))


if __name__ == "__main__":
    sys.exit(main())
