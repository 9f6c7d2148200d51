"""`bench.py gpu`, rehearsed on the CPU, and the rows of parts that fail."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools import bench
from tools.benchmarks.gpu import PARTS, GpuCase, Measurement, Result, attempt, run_part, start_server

ROOT = Path(__file__).parents[3]
CASE = GpuCase(Path(), "cpu", 1)
QUICK = {"checks", "images/s"}
ALL = {name for name, _, _ in PARTS}


def rehearse(parts: set[str], data_path: Path, out: Path) -> tuple[list[dict], str]:
    command = [sys.executable, "tools/bench.py", "gpu", "--device", "cpu", "--minutes", "60", "--threads", "1"]
    options = ["--shards", str(data_path), "--parts", ",".join(sorted(parts)), "--json", str(out)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["lines"], done.stdout


def check_table(parts: set[str], lines: list[dict], printed: str) -> None:
    """Each part has rows, each row has figures, and the table shows them all."""
    assert {line["part"] for line in lines} == parts
    assert [line for line in lines if line["error"] or not (line["figures"] or line["note"])] == []
    rows = [row.split("|")[1:-1] for row in printed[printed.rindex("| part") :].splitlines()[2:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [(line["part"], line["name"]) for line in lines]


def test_a_rehearsal_fills_the_table(data_path: Path, tmp_path: Path) -> None:
    lines, printed = rehearse(QUICK, data_path, tmp_path / "lines.json")
    check_table(QUICK, lines, printed)


@pytest.mark.slow
def test_a_rehearsal_of_all_parts_gives_figures_for_each(data_path: Path, tmp_path: Path) -> None:
    lines, printed = rehearse(ALL, data_path, tmp_path / "lines.json")
    check_table(ALL, lines, printed)
    rates = {line["name"]: line["figures"] for line in lines if line["part"] == "images/s"}
    assert len(rates) == 4
    assert all(figures["images/s"] > 0 for figures in rates.values())


def fails(case: GpuCase) -> Iterator[Result]:
    yield Result("first", {"ms": 1.0})
    raise TypeError("pages of trace\nencountered:\n\nno such argument\nmore")


def dies(case: GpuCase) -> Iterator[Result]:
    yield Result("first", {"ms": 1.0})
    os._exit(9)


def hangs(case: GpuCase) -> Iterator[Result]:
    yield Result("first", {"ms": 1.0})
    time.sleep(600)


@pytest.mark.parametrize(
    ("part", "seconds", "error"),
    [
        (fails, 600, "TypeError: no such argument"),
        (dies, 600, "its process ended with exit code 9"),
        (hangs, 10, "stopped after 10 s"),
    ],
)
def test_a_part_that_fails_keeps_its_lines_and_adds_one(part: Measurement, seconds: float, error: str) -> None:
    start_server()
    assert list(run_part(part, CASE, seconds)) == [Result("first", {"ms": 1.0}), Result("", error=error)]


def test_a_measurement_that_fails_does_not_end_its_part() -> None:
    lines = [*attempt("a", fails, CASE), *attempt("b", lambda: [Result("b", {"ms": 2.0})])]
    assert [line.name for line in lines] == ["first", "a", "b"]


def test_figures_are_shown_with_their_units() -> None:
    assert (
        Result("", {"images/s": 12345.6, "cores busy": 1.234, "max": 3.0}).text
        == "12,346 images/s, 1.23 cores busy, 3 max"
    )
    assert Result("", {"ms": 0.5}, error="why").text == "0.5 ms; FAILED: why"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", "step,theirs"], "unknown part 'theirs', allowed are checks, images/s"),
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
