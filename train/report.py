"""What a run leaves behind at its end: summary.json and the pictures."""

import json
from pathlib import Path
from typing import Any

import torch

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset
from train.build import build_loader
from train.config import Config
from train.figures import draw_crops, draw_curves, draw_masks
from train.loop import step_seed
from train.metrics import read_metrics
from train.probe import Probe
from train.state import RunState

PICTURED = 4  # images in crops.png and masks.png


def write_summary(folder: Path, config: Config, state: RunState, probe: Probe, width: int) -> dict[str, Any]:
    """Evaluate the trained encoder and write summary.json. Percentages are 0..100."""
    trained = probe.measure()
    knn = None if trained is None or probe.baselines is None else {**probe.baselines, "trained": trained}
    summary = {
        "run_name": config.logging.run_name,
        "steps": state.step,
        "images": state.images,
        "images_per_s": state.images / state.train_s,
        "data_wait_percent": 100 * state.wait_s / state.train_s,
        "loss_first": state.loss_first,
        "loss_last": state.loss_last,
        "rankme": probe.rankme,
        "width": width,
        "knn": knn,
        "bad_samples": state.bad_samples,
        "skipped_steps": state.skipped_steps,
        "collapse_alarms": state.alarms,
        "collapsed": state.collapsed,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def draw_figures(
    folder: Path, config: Config, dataset: MultiCropDataset, model: HJEPA, masks: MultiCropMaskGenerator
) -> list[Path]:
    """Draw crops.png and masks.png of the first positions of epoch 0, exactly as trained on, and curves.png."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    count = min(PICTURED, len(dataset))
    loader = build_loader(config, dataset, count)
    batch = next(iter(loader))
    normalisation = (dataset.mean, dataset.std)
    paths = [figures / name for name in ("crops.png", "masks.png", "curves.png")]
    draw_crops(paths[0], batch, dataset.index, loader.rows_at(0, 0, count), model.num_global, *normalisation)
    torch.manual_seed(step_seed(config.seed, 0, 1))
    plan = masks(count)
    draw_masks(paths[1], batch, plan, model.grid, masks.strides, *normalisation, count=2)
    draw_curves(paths[2], [line for line in read_metrics(folder) if "loss" in line])
    return paths
