"""The pictures of a run: crops and their boxes, masks, features, nearest neighbours and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from model.masks import MaskPlan, MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset
from pipeline.shards.index import UNLABELLED
from train.build import build_loader
from train.config.schema import Config
from train.output.drawing import (
    GLOBAL_SIDE,
    Views,
    crop_tiles,
    fit,
    hstack,
    mask_tiles,
    open_picture,
    save_picture,
    source_tile,
    tile,
    to_picture,
    vstack,
)
from train.output.log import read_metrics
from train.trainer import step_seed

if TYPE_CHECKING:
    from train.evaluation.online import Neighbours

NUM_PICTURED, NUM_MASKED = 4, 2  # images in crops.png and features.png, and in masks.png
QUERIES, NEIGHBOURS = 6, 7  # in neighbours.png
SOURCE_SIDE, NEIGHBOUR_SIDE = 400, 104  # pixels of the main picture of an overview, and of a neighbour


def draw_run(
    folder: Path,
    config: Config,
    dataset: MultiCropDataset,
    model: HJEPA,
    masks: MultiCropMaskGenerator,
    neighbours: Sequence["Neighbours"] = (),
) -> list[Path]:
    """Draw `folder/figures/*.png` and return their paths.

    crops and masks show the first positions of epoch 0, as trained on. neighbours.png needs some, curves.png a logged loss.
    """
    crops, masked, features, nearest, curves = paths = [
        folder / "figures" / f"{name}.png" for name in ("crops", "masks", "features", "neighbours", "curves")
    ]
    count = min(NUM_PICTURED, len(dataset))
    loader = build_loader(config, dataset, count)
    batch = next(iter(loader))
    views = Views(batch, model.num_global, dataset.mean, dataset.std)
    draw_crops(crops, views, [dataset.index.encoded(int(row)) for row in loader.rows_at(0, 0, count)])
    torch.manual_seed(step_seed(config.seed, 0, 1))
    rows = [(i, g) for i in range(min(NUM_MASKED, count)) for g in range(model.num_global)]
    draw_masks(masked, views, masks(count), model.grid, masks.strides, rows)
    draw_features(features, views, feature_colours(model.target, batch.crops[0]))
    if neighbours:
        draw_neighbours(nearest, neighbours)
    lines = read_metrics(folder)
    if any("loss" in line for line in lines):
        from train.output.plots import RUN_PANELS, draw_curves  # matplotlib takes a second to import

        draw_curves(curves, {folder.name: lines}, RUN_PANELS)
    return [path for path in paths if path.exists()]


def draw_crops(path: Path, views: Views, sources: Sequence[bytes]) -> None:
    """Draw a row per image: its source with the boxes of its crops, then the crops as the encoder gets them."""
    rows = []
    for i, encoded in enumerate(sources):
        source = open_picture(encoded)
        caption = f"position {int(views.batch.positions[i])}, {source.width}x{source.height}"
        rows.append(hstack([source_tile(source, caption, views, i, GLOBAL_SIDE), *crop_tiles(views, i)]))
    save_picture(path, vstack(rows))


def draw_masks(
    path: Path, views: Views, plan: MaskPlan, grid: int, strides: Sequence[int], rows: Sequence[tuple[int, int]]
) -> None:
    """Draw a row per (image, global crop): the crop, what the encoder sees of it, and the cells to predict at each level."""
    prefixes = [f"image {i}, " if len(rows) > 1 else "" for i, _ in rows]
    tiles = [
        mask_tiles(views, plan, i, g, grid, strides, prefix) for (i, g), prefix in zip(rows, prefixes, strict=True)
    ]
    save_picture(path, vstack(hstack(row) for row in tiles))


def draw_features(path: Path, views: Views, colours: np.ndarray) -> None:
    """Draw the first global crop of each image above its tokens' features as colours, `[n, g, g, 3]`."""
    captions = ["crop", "features: 3 principal components"]
    columns = []
    for i, colour in enumerate(colours):
        pictures = [to_picture(views.pixels(0, i)), to_picture(colour)]
        columns.append(vstack(tile(*pair, GLOBAL_SIDE) for pair in zip(pictures, captions, strict=True)))
        captions = ["", ""]
    save_picture(path, hstack(columns))


def draw_neighbours(path: Path, rows: Sequence["Neighbours"]) -> None:
    """Draw a row per validation image: itself, then its nearest training images, with the same label in green, else in red."""
    bands = []
    for row in rows:
        tiles = []
        for number, (encoded, label) in enumerate(zip(row.pictures, row.labels, strict=True)):
            colour, parts = "black", [f"class {label}"] if label != UNLABELLED else []
            if number:
                colour = "#606060" if label == UNLABELLED else "#2a8f2a" if label == row.labels[0] else "#c03030"
                parts.append(f"{row.similarities[number - 1]:.3f}")
            framed = ImageOps.expand(fit(open_picture(encoded), NEIGHBOUR_SIDE - 6), 3, colour)
            tiles.append(tile(framed, ", ".join(parts), NEIGHBOUR_SIDE, colour))
        bands.append(hstack(tiles))
    save_picture(path, vstack(bands))


def draw_overview(
    path: Path, views: Views, i: int, encoded: bytes, plan: MaskPlan, strides: Sequence[int], colours: np.ndarray
) -> None:
    """Draw image `i` with its boxes, its crops, the features of its target, `[g, g, 3]`, and the masks of its first global."""
    caption = f"one image, {views.num_global} global and {len(views) - views.num_global} local crops (dashed: flipped)"
    features = tile(to_picture(colours), "its features, as colours", GLOBAL_SIDE)
    masks = mask_tiles(views, plan, i, 0, len(colours), strides)[1:]
    right = vstack([hstack(crop_tiles(views, i)), hstack([features, *masks])])
    save_picture(path, hstack([source_tile(open_picture(encoded), caption, views, i, SOURCE_SIDE), right]))


def feature_colours(encoder: MultiCropEncoder, crops: torch.Tensor) -> np.ndarray:
    """`[n, 3, S, S] -> [n, g, g, 3]`, 0..1: three principal components of all tokens, each from its 1st to 99th percentile."""
    with torch.inference_mode():
        tokens = encoder([(crops, None)])[0].tokens.float()
    flat = tokens.flatten(0, 1).cpu()
    centred = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    scores = torch.nn.functional.pad(centred @ axes.T, (0, 3 - len(axes)))
    low, high = (torch.quantile(scores, share, dim=0) for share in (0.01, 0.99))
    side = crops.shape[-1] // encoder.patch_size
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(len(crops), side, side, 3).numpy()


def read_picture(path: Path) -> np.ndarray:
    """`[H, W, 3] uint8`"""
    return np.asarray(Image.open(path).convert("RGB"))
