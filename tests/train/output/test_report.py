"""Suggestions for a run that waited for its data or learned nothing."""

from pathlib import Path

import pytest

from train.config.load import load_config
from train.output.report import advice

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("wait", "steps", "trained", "images", "begins"),
    [
        (9.9, 1000, 50.0, 500, []),
        (10.1, 1000, 50.0, 500, ["too slow: the model waited for data 10 %"]),
        (80.0, 20, 50.0, 500, []),
        (1.0, 1000, 40.0, 500, ["poor results: k-NN is no better than with the random initialisation (40.0 %)"]),
        (50.0, 1000, 10.0, 500, ["too slow", "poor results"]),
        (50.0, 1000, None, 500, ["too slow"]),
        (1.0, 1000, 10.0, 13, ["accuracies are measured on only 13 validation images, 7.7 points each"]),
        (1.0, 1000, None, 13, []),
    ],
)
def test_each_trouble_has_its_line(wait: float, steps: int, trained: float | None, images: int, begins: list[str]) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [])
    knn = None if trained is None else {"trained": trained, "random_init": 40.0}
    lines = advice(config, {"data_wait_percent": wait, "steps": steps, "knn": knn, "validation_images": images})
    assert len(lines) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))


@pytest.mark.parametrize(("steps", "key"), [(300, "training.max_steps, now 300"), (200, "training.epochs, now 26")])
def test_to_train_longer_names_the_key_that_ended_the_run(steps: int, key: str) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["training.max_steps=300", "training.epochs=26"])
    knn = {"trained": 1.0, "random_init": 2.0}
    (line,) = advice(config, {"data_wait_percent": 0.0, "steps": steps, "knn": knn, "validation_images": 500})
    assert f"({key})" in line
