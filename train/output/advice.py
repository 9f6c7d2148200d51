"""What to try when a run waited for its data or learnt little: lines for the end of the run and for its report."""

from typing import Any

from train.config.schema import Config

MOST_WAIT_PERCENT = 10.0
LEAST_STEPS = 50  # of fewer, most are the start
LEAST_IMAGES = 100  # of fewer, a k-NN is chance: one image is more than a point


def advice(config: Config, summary: dict[str, Any]) -> list[str]:
    """`summary` is what summary.json holds. One line for each thing that does not look right."""
    lines = []
    wait, knn = summary["data_wait_percent"], summary["knn"]
    store_wait = summary.get("store_wait_percent") or 0.0
    if store_wait > MOST_WAIT_PERCENT and summary["steps"] >= LEAST_STEPS:
        lines.append(
            f"slow store: the model waited for shards of {config.data.data_path} {store_wait:.0f} % of the time. A store that is "
            "nearer, images stored smaller (make_shards.py convert --resize 512), or a data.cache_size_gb that holds them all"
        )
    elif wait > MOST_WAIT_PERCENT and summary["steps"] >= LEAST_STEPS:
        lines.append(
            f"too slow: the model waited for data {wait:.0f} % of the time. Fewer data.multicrop.num_local_crops (now "
            f"{config.data.multicrop.num_local_crops}), more data.num_workers (now {config.data.num_workers}) and cores, "
            "images stored smaller (make_shards.py convert --resize 512), or shards on a local disk"
        )
    images = summary["validation_images"]
    if knn is not None and images < LEAST_IMAGES:
        lines.append(
            f"accuracies are of {images} validation images alone, one of which makes {100 / images:.1f} points: too few to tell. "
            "Set more aside (make_shards.py convert --val-ratio), or judge by neighbours.png and features.png"
        )
    elif knn is not None and knn["trained"] <= knn["random_init"]:
        training = config.training
        by_steps = training.max_steps is not None and summary["steps"] >= training.max_steps
        longer = f"max_steps, now {training.max_steps}" if by_steps else f"epochs, now {training.epochs}"
        lines.append(
            f"poor results: k-NN is no better than at the random initialisation ({knn['random_init']:.1f} %). Train longer "
            f"(training.{longer}), try another masking.strategy, a training.lr two or four times higher or lower, or weaker "
            "augmentation (data.multicrop.*_color_jitter, data.augmentation)"
        )
    return lines
