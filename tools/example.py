"""The whole walk in Python, with pictures: photographs, shards, eight crops, three masking strategies, training, features.

`python tools/example.py` takes the photographs that come inside scikit-image, scikit-learn and matplotlib, and about a minute
on two CPU cores; `--data FOLDER` takes shards of your own. Read it from `main` on: each part is what a script of yours would do.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from train.output.display import LOADING

if __name__ == "__main__":
    print(LOADING, file=sys.stderr)

import torch
import webdataset
from PIL import Image

from model import MultiCropMaskGenerator
from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, default_levels
from model.losses import random_directions
from model.masks import STRATEGIES
from model.predictor import Predictor
from pipeline import CropBatch, build_multicrop_dataloader, build_multicrop_dataset
from pipeline.dataset import MultiCropDataset, resolve_device
from pipeline.notices import Every
from tools.shards.photographs import PHOTOGRAPHS, photograph_path
from train.optim import build_optimizer
from train.output.drawing import draw_global_masks, draw_source, plt, to_picture, view_colours
from train.output.pictures import token_colours

BATCH_SIZE, LR, EMA_MOMENTUM = 6, 1e-3, 0.99
SLICES, PROJECTOR = 64, 64
TOLD_EVERY_S = 5.0


def write_photographs(folder: Path) -> None:
    """A WebDataset: per photograph a JPEG and a class, under one key. Any writer of tars will do."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(folder / "photographs-000000.tar")) as tar:
        for label, (place, file, _, _) in enumerate(PHOTOGRAPHS):
            picture = Image.open(photograph_path(place, file)).convert("RGB")
            tar.write({"__key__": f"{label:04d}", "jpg": picture, "cls": label})


def build_hjepa(dataset: MultiCropDataset) -> HJEPA:
    """A small encoder for 224 and 96 pixels, with three levels to predict."""
    encoder = MultiCropEncoder(
        "vit_tiny_patch16_dinov3_qkvb", [224, 96], mean=dataset.mean, std=dataset.std, depth=6, init_values=0.1
    )
    levels = default_levels(encoder.depth)
    return HJEPA(
        encoder, Predictor(encoder.width, 96, 2, 3, len(levels)), levels, num_global_crops=2, global_crop_size=224,
        projector_hidden=256, projector_dim=PROJECTOR, view_weight=1.0, sigreg_weight=0.05, sigreg_knots=17,
    )  # fmt: skip


def train(model: HJEPA, dataset: MultiCropDataset, device: torch.device, steps: int) -> None:
    """The loop of `python -m train.run` without its schedules, checkpoints and guards."""
    loader = build_multicrop_dataloader(dataset, min(BATCH_SIZE, len(dataset)))
    mask_gen = MultiCropMaskGenerator("global_only", num_global_crops=2, num_local_crops=6, device=device)
    optimizer = build_optimizer(model, 0.05, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = LR
    generator, stream = torch.Generator(device), chain.from_iterable(repeat(loader))
    told = Every(TOLD_EVERY_S)
    for step, batch in enumerate(islice(stream, steps), 1):
        masks = mask_gen(batch_size=len(batch.labels))
        directions = random_directions(PROJECTOR, SLICES, generator, device)
        losses = model(batch.crops, batch.boxes, batch.flips, masks, directions)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(EMA_MOMENTUM)
        if step in (1, steps) or told.due():
            print(f"  step {step}: " + ", ".join(f"{k} {v.item():.3f}" for k, v in losses.items() if v.ndim == 0))


def draw_strategies(folder: Path, dataset: MultiCropDataset, batch: CropBatch, i: int) -> list[Path]:
    """One picture per strategy: the first global of image `i`, what it is predicted from, and what is asked."""
    paths = []
    for strategy in STRATEGIES:
        torch.manual_seed(1)
        mask_gen = MultiCropMaskGenerator(strategy, num_global_crops=2, num_local_crops=6, device=batch.boxes.device)
        figure, axes = plt.subplots(1, 5, figsize=(11, 2.5), layout="constrained")
        draw_global_masks(
            axes, batch, mask_gen(len(batch.labels)), i, 0, mask_gen.grid, mask_gen.strides, dataset.mean, dataset.std
        )
        paths.append(finish(figure, folder / f"{strategy}.png"))
    return paths


def draw_overview(path: Path, dataset: MultiCropDataset, batch: CropBatch, i: int, source: bytes, model: HJEPA) -> Path:
    """Image `i` with its boxes, its eight crops, the masks of its first global and the features of its target."""
    torch.manual_seed(1)
    mask_gen = MultiCropMaskGenerator("global_only", num_global_crops=2, num_local_crops=6, device=batch.boxes.device)
    figure = plt.figure(figsize=(13, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 14)
    whole = figure.add_subplot(grid[:, :4])
    colours = view_colours(model.num_global, len(batch.crops))
    draw_source(whole, Image.open(io.BytesIO(source)).convert("RGB"), batch, i, colours)
    whole.set_title("one image, 2 global and 6 local crops (dashed: mirrored)", fontsize=9)
    widths = [0, 2, 4, 5, 6, 7, 8, 9]
    for v, crop in enumerate(batch.crops):
        axis = figure.add_subplot(grid[0, 4 + widths[v] : 4 + widths[v] + (2 if v < model.num_global else 1)])
        axis.imshow(to_picture(crop[i], dataset.mean, dataset.std))
        axis.set_title(f"global {v}" if v < model.num_global else f"local {v - model.num_global}", fontsize=8)
    below = [figure.add_subplot(grid[1, 4 + 2 * k : 6 + 2 * k]) for k in range(5)]
    masks = mask_gen(len(batch.labels))
    draw_global_masks(below, batch, masks, i, 0, model.grid, mask_gen.strides, dataset.mean, dataset.std)
    with torch.inference_mode():
        tokens = model.target([(batch.crops[0], None)])[0].tokens.float()
    colours = token_colours(tokens)[i].unflatten(0, (model.grid, model.grid)).numpy()
    below[0].imshow(colours, interpolation="nearest", extent=(-0.5, batch.crops[0].shape[-1] - 0.5) * 2)
    below[0].set_title("its features, as colours", fontsize=8)
    return finish(figure, path)


def finish(figure: Any, path: Path) -> Path:
    for axis in figure.get_axes():
        axis.set_axis_off()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def walk(data: Path, out: Path, steps: int, image: int) -> None:
    """Raises ValueError or OSError when the shards or the folder for the pictures are none."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if resolve_device("auto") == "gpu" else "cpu")

    dataset = build_multicrop_dataset("custom", data, num_global_crops=2, num_local_crops=6)
    print(f"1. data set: {len(dataset)} images in {data}")

    loader = build_multicrop_dataloader(dataset, batch_size=min(BATCH_SIZE, len(dataset)), shuffle=False)
    batch = next(iter(loader))
    crops, labels = batch.crops, batch.labels
    print(f"2. a batch: {len(crops)} crops, {[tuple(crop.shape) for crop in crops[1:3]]} ..., labels {labels.tolist()}")

    print("3. masks: " + ", ".join(map(str, draw_strategies(out, dataset, batch, image))))

    torch.manual_seed(0)
    model = build_hjepa(dataset).to(device)
    print(f"4. training, {steps} steps:")
    train(model, dataset, device, steps)

    source = dataset.index.encoded(int(loader.rows_at(0, image, 1)[0]))
    print(f"5. features: {draw_overview(out / 'overview.png', dataset, batch, image, source, model)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="example", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="holds train/*.tar; default: photographs, put into OUT/shards"
    )
    parser.add_argument("--out", type=Path, default=Path("example"), help="pictures go here; default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of training; default: %(default)s")
    parser.add_argument("--image", type=int, default=0, help="of the first batch, to be drawn; default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        if given.data is None:
            given.data = given.out / "shards"
            write_photographs(given.data / "train")
        walk(given.data, given.out, given.steps, given.image)
    except (ValueError, OSError) as error:
        print(f"example: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
