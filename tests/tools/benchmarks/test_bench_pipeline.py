"""The pipeline's benchmark: its rows do the same work, all of it is counted, and what it prints and writes."""

import json
import multiprocessing
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import build_multicrop_dataset
from pipeline.shards.index import open_index
from tools import bench
from tools.benchmarks.measure import LoaderSetup, cpu_seconds, error_line, full_batches, interleave, table
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.pipeline import LOADERS, summarize

ROOT = Path(__file__).parents[3]
SOME_ROWS = ("ours", "torchvision", "dali-operators")


def test_the_command_prints_and_writes_each_row(data_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = f"--images 8 --batch 8 --rounds 1 --threads 1 --rows {','.join(SOME_ROWS)}"
    # In a subprocess, as it is used: the loaders are forked from a server of its own.
    command = [sys.executable, "tools/bench.py", "pipeline", "--json", str(out), "--shards", str(data_path)]
    done = subprocess.run([*command, *options.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == list(SOME_ROWS)
    for row in rows:
        assert row["images_per_s"] > 0
        assert row["cpu_ms_per_image"] > 0
    lines = done.stdout.splitlines()
    assert "103 images" in lines[0]
    assert [line.split()[1] for line in lines[3:6]] == list(SOME_ROWS)


def statistics_of(view: torch.Tensor, data_path: Path) -> dict[str, float]:
    dataset = build_multicrop_dataset("custom", data_path)
    pixels = view * torch.tensor(dataset.std)[:, None, None] + torch.tensor(dataset.mean)[:, None, None]
    gray = (pixels[:, 0] - pixels[:, 1]).abs().mean((1, 2)) < 0.01
    return {
        "mean": float(view.mean()),
        "std": float(view.std()),
        "gray": float(gray.float().mean()),
        "edges": float((view[..., 1:] - view[..., :-1]).abs().mean() * 5),
    }


def test_torchvision_makes_the_same_kind_of_crops(data_path: Path) -> None:
    made = []
    for name in ("ours", "torchvision"):
        torch.manual_seed(0)  # the seed of DataLoader's workers
        stream = LOADERS[name](LoaderSetup(data_path / "train", 32, 1))
        batches = [[crop.clone() for crop in next(stream)] for _ in range(4)]
        stream.close()  # type: ignore[attr-defined]
        made.append([torch.cat(views) for views in zip(*batches, strict=True)])
    for view, reference in zip(*made, strict=True):
        assert view.shape == reference.shape
        assert view.dtype == reference.dtype == torch.float32
    # One view of each recipe: blurred, solarized, local. The draws differ, what they are drawn from does not.
    for ours, theirs in list(zip(*made, strict=True))[:3]:
        assert statistics_of(theirs, data_path) == pytest.approx(statistics_of(ours, data_path), abs=0.15)


def test_the_photographs_are_of_imagenets_size_and_weight() -> None:
    with benchmark_shards(None, 96, 1) as folder:
        samples = np.array(open_index(folder).samples)
    assert len(samples) == 96
    assert set(zip(samples["width"].tolist(), samples["height"].tolist(), strict=True)) == {(500, 375)}
    assert 90_000 <= np.median(samples["size"]) <= 120_000
    assert len(set(samples["size"].tolist())) > 80  # no copies


def test_the_work_of_live_workers_is_counted() -> None:
    ours, theirs = multiprocessing.Pipe()
    before = cpu_seconds()
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(theirs,))
    worker.start()
    ours.recv()
    assert cpu_seconds() - before >= 0.2
    ours.send("stop")
    worker.join()


def _work(connection: Connection) -> None:
    while time.process_time() < 0.2:
        pass
    connection.send("done")
    connection.recv()


def test_images_are_rounded_up_to_full_batches_of_every_worker() -> None:
    for threads in (1, 2, 5, 16):
        for images in (1, 31, 32, 33, 257):
            count = full_batches(images, LoaderSetup(Path(), 32, threads))
            assert count % threads == 0
            assert images <= count * 32 < images + 32 * threads


def test_each_round_begins_with_another_measurement() -> None:
    calls: list[str] = []
    results = interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}, 2)
    assert "".join(calls) == "abcbca"
    assert results == {"a": [1, 6], "b": [2, 4], "c": [3, 5]}


def test_a_ratio_is_the_median_within_rounds_so_that_a_slow_round_does_not_move_it() -> None:
    ours, other = [(1.0, 2.0), (10.0, 20.0), (1.0, 2.0)], [(3.0, 6.0), (30.0, 60.0), (2.0, 4.0)]
    assert summarize(other, ours)["cpu_to_ours"] == 3.0
    assert summarize(other, None)["cpu_to_ours"] is None


def test_a_table_is_aligned_markdown() -> None:
    rows = table(["row", "ms"], [("a", 1), ("longer", 234)]).splitlines()
    assert rows == ["| row    |  ms |", "|--------|----:|", "| a      |   1 |", "| longer | 234 |"]


def test_an_error_of_dali_is_its_one_line_that_says_what_is_wrong() -> None:
    assert error_line(RuntimeError("pages of trace\nencountered:\n\nno such image\nmore")) == "no such image"
    assert error_line(ValueError()) == "ValueError()"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "ours,theirs"], "'theirs', allowed are ours, torchvision"),
        (["--rounds", "0"], "--rounds: 0, must be at least 1"),
        (["--shards", "nowhere"], "nowhere/train: no shards"),
    ],
)
def test_bad_options_are_one_clear_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["pipeline", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
