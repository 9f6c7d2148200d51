"""What a run says when it waited for its data or learnt nothing."""

from pathlib import Path

import pytest

from train.advice import advice
from train.config_file import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("wait", "steps", "trained", "begins"),
    [
        (9.9, 1000, 50.0, []),
        (10.1, 1000, 50.0, ["too slow: the model waited for data 10 %"]),
        (80.0, 20, 50.0, []),
        (1.0, 1000, 40.0, ["poor results: k-NN is no better than at the random initialisation (40.0 %)"]),
        (50.0, 1000, 10.0, ["too slow", "poor results"]),
        (50.0, 1000, None, ["too slow"]),
    ],
)
def test_each_trouble_has_its_line(wait: float, steps: int, trained: float | None, begins: list[str]) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [])
    knn = None if trained is None else {"trained": trained, "random_init": 40.0}
    lines = advice(config, {"data_wait_percent": wait, "steps": steps, "knn": knn})
    assert len(lines) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))
