"""`python tools/bench.py store`: rows, requests and verdicts of a small set behind a fast proxy."""

import json
from pathlib import Path

import pytest

from pipeline.shards.index import open_index, save_index
from tests.conftest import write_shards
from tools.bench import main


def test_each_row_has_its_requests_and_each_target_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("moto", "s3fs"):
        pytest.importorskip(package)
    out, folder = tmp_path / "rows.json", write_shards(tmp_path / "train", [20, 20])
    options = ["--shards", str(tmp_path), "--bandwidth", "1000", "--rounds", "1", "--batch", "8"]
    assert main(["store", *options]) == 2
    assert "index.json. Write it with" in capsys.readouterr().err
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)
    assert main(["store", "--json", str(out), *options]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    names = ["local", "cold", "warm"]
    assert list(rows) == names
    assert [rows[name]["shard_requests"] for name in names] == [0, 2, 0]
    assert rows["local"]["requests"] == 0
    assert rows["warm"]["requests"] == rows["cold"]["requests"] - 2
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith((": met", ": MISSED")) for line in lines) == 3
