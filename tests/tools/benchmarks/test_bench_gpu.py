"""The command for a GPU node, rehearsed on the CPU, and what becomes of parts that fail."""

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
from tools.benchmarks.gpu import run_part, start_server
from tools.benchmarks.gpu_parts.data import OPERATIONS
from tools.benchmarks.gpu_parts.part import PARTS, Case, Line, Measurement, attempt
from tools.benchmarks.gpu_parts.suite import rows_of
from tools.benchmarks.tables import table, target

ROOT = Path(__file__).parents[3]
CASE = Case(Path(), "cpu", 1)
QUICK = {"crops", "DALI memory"}


def rehearse(parts: set[str], data_path: Path, out: Path) -> tuple[list[dict], str]:
    command = [sys.executable, "tools/bench.py", "gpu", "--device", "cpu", "--minutes", "60", "--threads", "1"]
    given = ["--shards", str(data_path), "--parts", ",".join(sorted(parts)), "--json", str(out)]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["lines"], done.stdout


def check_table(parts: set[str], lines: list[dict], printed: str) -> None:
    """Each part has rows, each row has figures, and the table shows them all."""
    assert {line["part"] for line in lines} == parts
    assert [line for line in lines if line["error"] or not line["figures"]] == []
    rows = [row.split("|")[1:-1] for row in printed[printed.rindex("| part") :].splitlines()[2:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [(line["part"], line["what"]) for line in lines]


def check_crops(lines: list[dict]) -> None:
    """DALI's operators and ours differ by a rounding; the hybrid is ours."""
    crops = {line["what"]: line["figures"] for line in lines if line["part"] == "crops"}
    assert len(crops) == len(OPERATIONS) + 2 * 3
    for what, figures in crops.items():
        assert figures["mean"] <= (0 if "hybrid" in what else 1), what


def test_a_rehearsal_fills_the_table(data_path: Path, tmp_path: Path) -> None:
    lines, printed = rehearse(QUICK, data_path, tmp_path / "lines.json")
    check_table(QUICK, lines, printed)
    check_crops(lines)


@pytest.mark.slow
def test_a_rehearsal_of_all_parts_gives_figures_for_each(data_path: Path, tmp_path: Path) -> None:
    lines, printed = rehearse(set(PARTS), data_path, tmp_path / "lines.json")
    check_table(set(PARTS), lines, printed)
    check_crops(lines)
    rates = {line["what"]: line["figures"] for line in lines if line["part"] == "images/s"}
    assert len(rates) == 4
    assert all(figures["images/s"] > 0 for figures in rates.values())
    tests = [line["figures"] for line in lines if line["part"] == "tests"]
    assert len(tests) > 5
    if not torch.cuda.is_available():
        assert {kind for figures in tests for kind in figures} == {"skipped"}


VERBOSE = """\
tests/a.py::test_x[1 2] PASSED                                          [ 20%]
tests/a.py::test_y SKIPPED (needs a CUDA GPU, torch sees none)          [ 40%]
tests/b/c.py::test_z FAILED                                             [ 60%]
tests/b/c.py::test_w ERROR                                              [ 80%]

=========================== short test summary info ============================
FAILED tests/b/c.py::test_z - AssertionError: assert 1 == 2
ERROR tests/b/c.py::test_w
============= 1 failed, 1 passed, 1 skipped, 1 error in 0.02s =============
"""


def test_the_tests_of_a_gpu_are_a_row_for_each_file_and_for_each_failure() -> None:
    last: list[str] = []
    assert list(rows_of(VERBOSE.splitlines(keepends=True), last)) == [
        Line("tests/a.py", {"passed": 1.0, "skipped": 1.0}),
        Line("tests/b/c.py", {"failed": 1.0, "errors": 1.0}, "test_z test_w"),
        Line("tests/b/c.py::test_z", error="AssertionError: assert 1 == 2"),
        Line("tests/b/c.py::test_w", error="failed"),
    ]
    assert "1 failed" in last[0]


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
