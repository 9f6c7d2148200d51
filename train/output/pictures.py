"""The pictures of a run, drawn when its features are measured and at its end."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset
from train.build import build_loader
from train.config.schema import Config
from train.output.drawing import Neighbours, draw_crops, draw_curves, draw_features, draw_masks, draw_neighbours
from train.output.log import read_metrics
from train.step import step_seed

PICTURED = 4  # images in crops.png and features.png
QUERIES, NEIGHBOURS = 6, 7  # in neighbours.png


def draw_figures(
    folder: Path,
    config: Config,
    dataset: MultiCropDataset,
    model: HJEPA,
    masks: MultiCropMaskGenerator,
    neighbours: Sequence[Neighbours] = (),
) -> list[Path]:
    """Draw crops.png and masks.png of the first positions of epoch 0, as trained on, features.png, curves.png and, where there
    are `neighbours`, neighbours.png."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    count = min(PICTURED, len(dataset))
    loader = build_loader(config, dataset, count)
    batch = next(iter(loader))
    normalisation = (dataset.mean, dataset.std)
    paths = [figures / name for name in ("crops.png", "masks.png", "features.png", "neighbours.png", "curves.png")]
    draw_crops(paths[0], batch, dataset.index, loader.rows_at(0, 0, count), model.num_global, *normalisation)
    torch.manual_seed(step_seed(config.seed, 0, 1))
    plan = masks(count)
    draw_masks(paths[1], batch, plan, model.grid, masks.strides, *normalisation, count=2)
    with torch.inference_mode():
        tokens = model.target([(batch.crops[0], None)])[0].tokens.float()
    draw_features(paths[2], batch.crops[0], token_colours(tokens), model.grid, *normalisation)
    if neighbours:
        draw_neighbours(paths[3], neighbours)
    lines = [line for line in read_metrics(folder) if "loss" in line]
    if lines:
        draw_curves(paths[4], lines)
    return [path for path in paths if path.exists()]


def token_colours(tokens: torch.Tensor) -> torch.Tensor:
    """`[n, N, D] -> [n, N, 3]`, 0..1: three principal components over all tokens, each from its 1st to 99th percentile."""
    flat = tokens.flatten(0, 1).cpu()
    centred = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    scores = torch.nn.functional.pad(centred @ axes.T, (0, 3 - len(axes)))
    low, high = (torch.quantile(scores, share, dim=0) for share in (0.01, 0.99))
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).unflatten(0, tokens.shape[:2])


def read_picture(path: Path) -> np.ndarray:
    """`[H, W, 3] uint8`"""
    return np.asarray(Image.open(path).convert("RGB"))
