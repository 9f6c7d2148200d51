"""The benchmark of the seams between windows prints its figures and writes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_both_shares_are_printed_and_written(data_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "tools/bench.py", "windows", "--json", str(out), "--shards", str(data_path)]
    done = subprocess.run(
        [*command, "--rows", "32", "--images", "64", "--rounds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["windows-wall", "windows-CPU"]
    assert done.stdout.count("of an epoch in windows of 50,000") == 2
    # To build a graph takes time, but nowhere near that of 50,000 images.
    assert rows[1]["share_of_epoch"] < 1
