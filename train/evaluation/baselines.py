"""baselines.json: accuracies that need no training, kept with what they were measured on."""

import json
import math
from pathlib import Path
from typing import Any

from pipeline.shards.index import ShardIndex
from pipeline.shards.manifest import read_object
from train.config.schema import Evaluation
from train.output.folder import write_whole

NAMES = ("pixels", "colour_histogram", "random_init")
FILE = "baselines.json"


def measured_on(train: ShardIndex, val: ShardIndex, settings: Evaluation) -> dict[str, Any]:
    """What the accuracies depend on and a run may change: the images in use of both splits, and settings."""
    return {
        "train": train.digest,
        "val": val.digest,
        "knn_k": settings.knn_k,
        "crop_ratio": settings.crop_ratio,
    }


def read_baselines(path: Path, key: dict[str, Any]) -> dict[str, float] | None:
    """The accuracies measured on `key`; None for a file that is absent or of something else. ValueError for a damaged one."""
    if not path.exists():
        return None
    content = read_object(path, "It is measured again")
    if content.get("measured_on") != key:
        return None
    scores = content.get("knn")
    if not isinstance(scores, dict) or scores.keys() != set(NAMES) or not all(map(_is_percentage, scores.values())):
        raise ValueError(
            f"{path}: damaged: knn is not a percentage for each of {', '.join(NAMES)}. It is measured again"
        )
    return {name: scores[name] for name in NAMES}


def write_baselines(path: Path, key: dict[str, Any], scores: dict[str, float]) -> None:
    write_whole(path, json.dumps({"measured_on": key, "knn": scores}, indent=1) + "\n")


def _is_percentage(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 100
