"""The pictures of a run, drawn when its features are measured and at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset
from train.build import build_loader
from train.config.schema import Config
from train.output.drawing import (
    Views,
    draw_crops,
    draw_features,
    draw_masks,
    draw_neighbours,
    feature_colours,
)
from train.output.log import read_metrics
from train.output.plots import RUN_PANELS, draw_curves
from train.trainer import step_seed

if TYPE_CHECKING:
    from train.evaluation.online import Neighbours

PICTURED, MASKED = 4, 2  # images in crops.png and features.png, and in masks.png
QUERIES, NEIGHBOURS = 6, 7  # in neighbours.png


def draw_run(
    folder: Path,
    config: Config,
    dataset: MultiCropDataset,
    model: HJEPA,
    masks: MultiCropMaskGenerator,
    neighbours: Sequence["Neighbours"] = (),
) -> list[Path]:
    """Draw `folder/figures/*.png`; returns their paths.

    crops and masks show the first positions of epoch 0, as trained on. neighbours needs some, and curves a logged loss.
    """
    paths = [folder / "figures" / f"{name}.png" for name in ("crops", "masks", "features", "neighbours", "curves")]
    count = min(PICTURED, len(dataset))
    loader = build_loader(config, dataset, count)
    batch = next(iter(loader))
    views = Views(batch, model.num_global, dataset.mean, dataset.std)
    draw_crops(paths[0], views, [dataset.index.encoded(int(row)) for row in loader.rows_at(0, 0, count)])
    torch.manual_seed(step_seed(config.seed, 0, 1))
    rows = [(i, g) for i in range(min(MASKED, count)) for g in range(model.num_global)]
    draw_masks(paths[1], views, masks(count), model.grid, masks.strides, rows)
    draw_features(paths[2], views, feature_colours(model.target, batch.crops[0]))
    if neighbours:
        draw_neighbours(paths[3], neighbours)
    lines = read_metrics(folder)
    if any("loss" in line for line in lines):
        draw_curves(paths[4], {folder.name: lines}, RUN_PANELS)
    return [path for path in paths if path.exists()]


def read_picture(path: Path) -> np.ndarray:
    """`[H, W, 3] uint8`"""
    return np.asarray(Image.open(path).convert("RGB"))
