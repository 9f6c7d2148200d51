"""`python tools/bench.py store`: rows, requests and verdicts of a small set over a fast line."""

import json
from pathlib import Path

import pytest

from tools.bench import main
from tools.benchmarks.store.command import ROWS


def test_each_row_has_its_requests_and_each_target_a_verdict(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("moto", "s3fs"):
        pytest.importorskip(package)
    out = tmp_path / "rows.json"
    options = ["--shards", str(data_path), "--line", "1000", "--rounds", "1", "--batch", "8"]
    assert main(["store", "--json", str(out), *options]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert tuple(rows) == ROWS
    shards = len(list((data_path / "train").glob("*.tar")))
    assert [rows[name]["shard_requests"] for name in ROWS] == [0, shards, shards, 0]
    assert rows["local"]["requests"] == 0
    assert rows["warm"]["requests"] == rows["cold"]["requests"] - shards
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith((": met", ": MISSED")) for line in lines) == 3
