"""The results of a run at its end: summary.json, report.md, and suggestions for a run that waited or learned little."""

import json
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from pipeline.shards.storage import is_remote
from train.config.schema import Config
from train.evaluation.online import OnlineEvaluation
from train.output.display import summary_rows
from train.state import RunState

MAX_WAIT_PERCENT = 10.0
MIN_STEPS = 50  # shorter runs spend most of their time starting up
MIN_IMAGES = 100  # with fewer validation images, one image is more than a percentage point


def write_summary(folder: Path, config: Config, state: RunState, probe: OnlineEvaluation, width: int) -> dict[str, Any]:
    """Evaluate the trained encoder, write summary.json and return its content. Percentages are 0..100."""
    trained = probe.measure()
    knn = None if trained is None or probe.baselines is None else {**probe.baselines, "trained": trained}
    summary = {
        "run_name": config.logging.run_name,
        "steps": state.step,
        "images": state.images,
        "images_per_s": state.images / state.train_s,
        "data_wait_percent": 100 * state.wait_s / state.train_s,
        "store_wait_percent": 100 * state.store_wait_s / state.train_s if is_remote(config.data.data_path) else None,
        "loss_first": state.loss_first,
        "loss_last": state.loss_last,
        "rankme": probe.rankme,
        "width": width,
        "validation_images": probe.num_validation,
        "knn": knn,
        "one_label": probe.one_label,
        "linear": probe.linear,
        "bad_samples": state.bad_samples,
        "skipped_steps": state.skipped_steps,
        "collapse_alarms": state.alarms,
        "collapsed": state.collapsed,
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def write_report(folder: Path, summary: dict[str, Any], hints: list[str], figures: list[Path]) -> Path:
    """Write report.md, the run on one page, next to summary.json."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary_rows(summary))
    sections = [
        f"# {summary['run_name']}",
        f"{summary['steps']:,} steps. Settings: [config.yaml](config.yaml); machine and packages: "
        "[environment.json](environment.json); every logged number: [metrics.jsonl](metrics.jsonl).",
        f"| | |\n|---|---|\n{rows}",
        *(f"{hint}." for hint in hints),
        *(f"## {figure.stem}\n\n![{figure.stem}](figures/{figure.name})" for figure in figures),
    ]
    path = folder / "report.md"
    write_atomic(path, "\n\n".join(sections) + "\n")
    return path


def stop_setting(config: Config, steps: int) -> str:
    """Return the setting that ends a run after so many steps, with its value."""
    training = config.training
    if training.max_steps is not None and steps >= training.max_steps:
        return f"training.max_steps, now {training.max_steps}"
    return f"training.epochs, now {training.epochs}"


def advice(config: Config, summary: dict[str, Any]) -> list[str]:
    """Return a suggestion for each problem of a run. `summary` is the content of summary.json."""
    data, knn, images = config.data, summary["knn"], summary["validation_images"]
    hints = []
    wait, store_wait = summary["data_wait_percent"], summary.get("store_wait_percent") or 0.0
    if summary["steps"] >= MIN_STEPS and store_wait > MAX_WAIT_PERCENT:
        hints.append(
            f"slow store: the model waited for shards of {data.data_path} {store_wait:.0f} % of the time. More "
            f"data.store_streams (now {data.store_streams}), a nearer store, images stored smaller "
            "(make_shards.py convert --resize 512), or a data.cache_size_gb that holds them all"
        )
    elif summary["steps"] >= MIN_STEPS and wait > MAX_WAIT_PERCENT:
        hints.append(
            f"too slow: the model waited for data {wait:.0f} % of the time. Fewer data.multicrop.num_local_crops (now "
            f"{data.multicrop.num_local_crops}), more data.num_workers (now {data.num_workers}) and cores, "
            "smaller stored images (make_shards.py convert --resize 512), or shards on a local disk"
        )
    if summary.get("one_label"):
        hints.append(
            "no accuracies: all training images have one label, so they would mean nothing. Convert a folder that holds one "
            "folder for each class, or judge by neighbours.png and features.png"
        )
    if knn is not None and images < MIN_IMAGES:
        hints.append(
            f"accuracies are measured on only {images} validation images, {100 / images:.1f} points each: too few to judge by. "
            "Set more aside (make_shards.py convert --val-ratio), or look at neighbours.png and features.png"
        )
    elif knn is not None and knn["trained"] <= knn["random_init"]:
        hints.append(
            f"poor results: k-NN is no better than with the random initialisation ({knn['random_init']:.1f} %). Train longer "
            f"({stop_setting(config, summary['steps'])}), try another masking.strategy, a training.lr two or four times "
            "higher or lower, or weaker augmentation (data.multicrop.*_color_jitter, data.augmentation)"
        )
    return hints
