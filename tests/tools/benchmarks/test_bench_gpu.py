"""The command for a GPU node, rehearsed on the CPU, and what becomes of parts that fail."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools import bench
from tools.benchmarks.gpu import run_part, start_server
from tools.benchmarks.gpu_parts.part import PARTS, Case, Line, Measurement, attempt
from tools.benchmarks.tables import table, target

ROOT = Path(__file__).parents[3]
CASE = Case(Path(), "cpu", 1)
MISSING = re.compile(r"unexpected keyword argument '(crop_device|compiled)'")
SLOW = {"compiled step", "tests"}  # minutes of a compiler; pytest within pytest


def rehearse(parts: set[str], data_path: Path, out: Path) -> tuple[list[dict], str]:
    command = [sys.executable, "tools/bench.py", "gpu", "--device", "cpu", "--minutes", "60", "--threads", "1"]
    given = ["--shards", str(data_path), "--parts", ",".join(sorted(parts)), "--json", str(out)]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["lines"], done.stdout


def test_the_rehearsal_fills_the_table(data_path: Path, tmp_path: Path) -> None:
    parts = PARTS.keys() - SLOW
    lines, printed = rehearse(parts, data_path, tmp_path / "lines.json")
    assert {line["part"] for line in lines} == parts
    assert all(line["figures"] for line in lines if not line["error"])
    # Until the loader has these two arguments, what needs them is a failed row, and the only one.
    assert [line["error"] for line in lines if line["error"] and not MISSING.search(line["error"])] == []
    rows = [row.split("|")[1:-1] for row in printed[printed.rindex("| part") :].splitlines()[2:]]
    assert [row[0].strip() for row in rows] == [line["part"] for line in lines]
    by_name = {(line["part"], line["what"]): line["figures"] for line in lines}
    for (part, what), figures in by_name.items():
        if part == "crops" and figures:
            assert figures["mean"] <= (0 if "hybrid" in what else 1), what  # DALI's operators and ours
    rates = {what: figures for (part, what), figures in by_name.items() if part == "images/s"}
    assert len(rates) == 4
    assert all(figures["images/s"] > 0 for figures in rates.values() if figures)


@pytest.mark.slow
def test_the_rehearsal_compiles_and_runs_the_tests_for_a_gpu(data_path: Path, tmp_path: Path) -> None:
    lines, _ = rehearse(SLOW, data_path, tmp_path / "lines.json")
    assert [line for line in lines if line["error"]] == []
    (tests,) = (line["figures"] for line in lines if line["part"] == "tests")
    if not torch.cuda.is_available():
        assert tests.keys() == {"skipped"}


def fails(case: Case) -> Iterator[Line]:
    yield Line("first", {"ms": 1.0})
    raise TypeError("pages of trace\nencountered:\n\nno such argument\nmore")


def dies(case: Case) -> Iterator[Line]:
    yield Line("first", {"ms": 1.0})
    os._exit(9)


def hangs(case: Case) -> Iterator[Line]:
    yield Line("first", {"ms": 1.0})
    time.sleep(600)


@pytest.mark.parametrize(
    ("part", "seconds", "error"),
    [
        (fails, 600, "TypeError: no such argument"),
        (dies, 600, "its process ended with exit code 9"),
        (hangs, 30, "stopped after 30 s"),
    ],
)
def test_a_part_that_fails_keeps_its_lines_and_adds_one(part: Measurement, seconds: float, error: str) -> None:
    start_server()
    assert list(run_part(part, CASE, seconds)) == [Line("first", {"ms": 1.0}), Line("", error=error)]


def test_a_measurement_that_fails_does_not_end_its_part() -> None:
    lines = [*attempt("a", fails, CASE), *attempt("b", lambda: [Line("b", {"ms": 2.0})])]
    assert [line.what for line in lines] == ["first", "a", "b"]


def test_figures_are_shown_with_their_units() -> None:
    assert (
        Line("", {"images/s": 12345.6, "cores busy": 1.234, "max": 3.0}).text
        == "12,346 images/s, 1.23 cores busy, 3 max"
    )
    assert Line("", {"ms": 0.5}, error="why").text == "0.5 ms; FAILED: why"


def test_a_table_is_aligned_markdown_and_a_target_has_a_verdict() -> None:
    rows = table(["row", "ms"], [("a", 1), ("longer", 234)]).splitlines()
    assert rows == ["| row    |  ms |", "|--------|----:|", "| a      |   1 |", "| longer | 234 |"]
    assert target("x", 1.0, "<=", 1.0).endswith(": met")
    assert target("x", 1.0, ">=", 1.1).endswith(": MISSED")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", "crops,theirs"], "unknown part 'theirs', allowed are crops, images/s"),
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
