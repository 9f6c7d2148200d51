"""Rank correlations of scores with and without labels."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tools.studies.ranking import correlation, interval, main


def table(path: Path, slope: float, count: int = 12, **more: str) -> Path:
    rng = np.random.default_rng(count)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "knn", "linear", "rankme", "placement", *more])
        writer.writeheader()
        for number in range(count):
            values = {"knn": 60 + number, "linear": "", "rankme": rng.normal(), "placement": 30 + slope * number}
            writer.writerow({"variant": "2+6", **values, **more})
        writer.writerow({"variant": "raw pixels", "knn": 0, "linear": 0, "rankme": 0, "placement": 99, **more})
    return path


def test_the_correlation_is_spearmans_and_over_data_sets_that_of_the_ranks_within_each() -> None:
    rng = np.random.default_rng(0)
    for count in (8, 20, 100):
        pairs = rng.normal(size=(count, 2)) @ np.array([[1, 0.7], [0, 0.7]])
        rho = correlation([pairs])
        assert rho == pytest.approx(stats.spearmanr(pairs)[0])
        low, high = interval([pairs])
        assert low <= rho <= high
        # Another scale and offset in each data set change nothing.
        assert correlation([pairs, pairs * [3, -2] + 40, pairs * 5 - 7]) == pytest.approx(rho / 3)


def test_the_command_writes_a_line_for_each_data_set_and_leaves_out_what_was_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = [
        table(tmp_path / "rising.csv", 1.0),
        table(tmp_path / "b.csv", -1.0, data="falling"),
        table(tmp_path / "few.csv", 1, 4),
    ]
    assert main([*map(str, tables), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| knn | placement | rising | 12 | 1.00 | 1.00 to 1.00 |" in said
    assert "| knn | placement | falling | 12 | -1.00 |" in said
    assert "| knn | placement | all, ranked within each | 24 | 0.00 |" in said
    assert "| knn | rankme | rising | 12 |" in said
    assert "few" not in said
    assert "| linear" not in said
    assert said.strip() in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").stat().st_size > 5_000
    assert main([str(tables[2]), "--out", str(tmp_path / "none")]) == 2
    assert "no data set has 5 trained encoders" in capsys.readouterr().err
