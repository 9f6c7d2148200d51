"""`bench.py gpu`, rehearsed on the CPU, and the rows of parts that fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools import bench
from tools.benchmarks.gpu import MINUTES, MINUTES_OF_PARTS, Result, run_limited
from tools.benchmarks.gpu_parts import PARTS, Figures, GpuCase, Measurement, plan

ROOT = Path(__file__).parents[3]
CASE = GpuCase(Path(), "cpu", 1)
QUICK = {"parity", "images/s"}
START_S = 45  # imports, photographs, and the first compilation of the CPU operator


def rehearse(parts: set[str], data_path: Path, out: Path) -> tuple[list[dict], str]:
    command = [sys.executable, "tools/bench.py", "gpu", "--device", "cpu", "--threads", "1"]
    options = ["--shards", str(data_path), "--parts", ",".join(sorted(parts)), "--json", str(out)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["lines"], done.stdout


def test_all_parts_fit_eight_minutes_and_each_of_them_three() -> None:
    needs = {part: sum(PARTS[each] for each, *_ in plan("gpu") if each == part) for part in PARTS}
    assert START_S + sum(needs.values()) <= 60 * MINUTES
    assert START_S + max(needs.values()) <= 60 * MINUTES_OF_PARTS


def check_table(parts: set[str], lines: list[dict], printed: str) -> None:
    """Each part has rows, each row has figures, and the table shows them all."""
    assert {line["part"] for line in lines} == parts
    assert [line for line in lines if line["error"] or not line["figures"]] == []
    rows = [row.split("|")[1:-1] for row in printed[printed.rindex("| part") :].splitlines()[2:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [(line["part"], line["name"]) for line in lines]


def test_a_rehearsal_fills_the_table(data_path: Path, tmp_path: Path) -> None:
    lines, printed = rehearse(QUICK, data_path, tmp_path / "lines.json")
    check_table(QUICK, lines, printed)


@pytest.mark.slow
def test_a_rehearsal_of_all_parts_gives_figures_for_each(data_path: Path, tmp_path: Path) -> None:
    lines, printed = rehearse(set(PARTS), data_path, tmp_path / "lines.json")
    check_table(set(PARTS), lines, printed)
    rates = {line["name"]: line["figures"] for line in lines if line["part"] == "images/s"}
    assert len(rates) == 4
    assert all(figures["images/s"] > 0 for figures in rates.values())


def fails(case: GpuCase) -> dict[str, Figures]:
    raise TypeError("pages of trace\nencountered:\n\nno such argument\nmore")


def dies(case: GpuCase) -> dict[str, Figures]:
    os._exit(9)


def hangs(case: GpuCase) -> dict[str, Figures]:
    time.sleep(600)
    return {}


@pytest.mark.parametrize(
    ("measurement", "seconds", "error"),
    [
        (fails, 600, "TypeError: no such argument"),
        (dies, 600, "its process ended: killed, or crashed"),
        (hangs, 2, "stopped after 2 s"),
    ],
)
def test_a_measurement_that_fails_is_one_row_with_the_reason(measurement: Measurement, seconds: float, error: str) -> None:
    assert run_limited("a", measurement, CASE, seconds) == [Result("a", error=error)]


def test_figures_are_shown_with_their_units() -> None:
    assert Result("", {"images/s": 12345.6, "cores busy": 1.234}).text == "12,346 images/s, 1.23 cores busy"
    assert Result("", error="why").text == "FAILED: why"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", "step,theirs"], "unknown name 'theirs', allowed are parity, images/s"),
        pytest.param(
            ["--device", "gpu"], "torch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_bad_options_are_one_clear_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["gpu", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
