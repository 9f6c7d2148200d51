"""Suggestions for a run that waited for its data or learned little, for the end of the run and for its report."""

from typing import Any

from train.config.schema import Config

MOST_WAIT_PERCENT = 10.0
LEAST_STEPS = 50  # of fewer, most of the time is start-up
LEAST_IMAGES = 100  # with fewer, one image is more than a point


def limiting_key(config: Config, steps: int) -> str:
    """The setting that ends a run after so many steps, with its value."""
    training = config.training
    if training.max_steps is not None and steps >= training.max_steps:
        return f"training.max_steps, now {training.max_steps}"
    return f"training.epochs, now {training.epochs}"


def advice(config: Config, summary: dict[str, Any]) -> list[str]:
    """`summary` is the content of summary.json. One line for each problem."""
    lines = []
    wait, knn = summary["data_wait_percent"], summary["knn"]
    store_wait = summary.get("store_wait_percent") or 0.0
    if store_wait > MOST_WAIT_PERCENT and summary["steps"] >= LEAST_STEPS:
        lines.append(
            f"slow store: the model waited for shards of {config.data.data_path} {store_wait:.0f} % of the time. More "
            f"data.store_streams (now {config.data.store_streams}), a store that is nearer, images stored smaller "
            "(make_shards.py convert --resize 512), or a data.cache_size_gb that holds them all"
        )
    elif wait > MOST_WAIT_PERCENT and summary["steps"] >= LEAST_STEPS:
        lines.append(
            f"too slow: the model waited for data {wait:.0f} % of the time. Fewer data.multicrop.num_local_crops (now "
            f"{config.data.multicrop.num_local_crops}), more data.num_workers (now {config.data.num_workers}) and cores, "
            "smaller stored images (make_shards.py convert --resize 512), or shards on a local disk"
        )
    if summary.get("one_label"):
        lines.append(
            "no accuracies: all training images have one label, so they would mean nothing. Convert a folder that holds one "
            "folder for each class, or judge by neighbours.png and features.png"
        )
    images = summary["validation_images"]
    if knn is not None and images < LEAST_IMAGES:
        lines.append(
            f"accuracies are measured on only {images} validation images, {100 / images:.1f} points each: too few to judge by. "
            "Set more aside (make_shards.py convert --val-ratio), or look at neighbours.png and features.png"
        )
    elif knn is not None and knn["trained"] <= knn["random_init"]:
        longer = limiting_key(config, summary["steps"])
        lines.append(
            f"poor results: k-NN is no better than with the random initialisation ({knn['random_init']:.1f} %). Train longer "
            f"({longer}), try another masking.strategy, a training.lr two or four times higher or lower, or weaker "
            "augmentation (data.multicrop.*_color_jitter, data.augmentation)"
        )
    return lines
