"""A container with 1.5 GB: conversion, training and evaluation fit, and the program knows its limit. Long: `make soak`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.shards.index import open_index
from tests.conftest import photographs
from tests.train.test_run import QUICKSTART, ROOT

LIMIT = 1_500_000_000


@pytest.fixture
def container() -> Iterator[Path]:
    """A memory cgroup inside that of this process, version 1 or 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root, name = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        own = Path(root, path.strip("/"))
        if controllers in ("", "memory") and (own / name).exists() and os.access(own, os.W_OK):
            group = own / f"multicrop-hjepa-{os.getpid()}"
            group.mkdir()
            try:
                (group / name).write_text(str(LIMIT))
                yield group
            finally:
                group.rmdir()
            return
    pytest.skip("no memory cgroup that this user may divide")


def inside(container: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = f'echo $$ > {container}/cgroup.procs && exec "$0" "$@"'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_container_of_one_and_a_half_gigabytes_converts_trains_and_evaluates(container: Path, tmp_path: Path) -> None:
    for number, picture in enumerate(photographs(120)):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.resize((1600, 1200)).save(folder / f"{number:03d}.jpg")
    told = inside(container, "tools/make_shards.py", "convert", "--help").stdout
    assert any(f"fewer where memory is short: {workers} here" in " ".join(told.split()) for workers in (1, 2))
    done = inside(
        container, "tools/make_shards.py", "convert", tmp_path / "photos", "--out", tmp_path / "set", "--val-ratio", 0.2
    )
    assert done.returncode == 0, done.stderr
    assert len(open_index(tmp_path / "set" / "train")) == 96
    settings = [f"data.data_path={tmp_path / 'set'}", f"logging.run_dir={tmp_path}", "data.batch_size=32", "device=cpu"]
    train = ["-m", "train.run", QUICKSTART, *settings, "training.max_steps=12", "training.warmup_epochs=0"]
    done = inside(container, *train, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "of the 1.4 GiB there are" in done.stdout
    done = inside(container, *train)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quickstart" / "report.html").exists()
    done = inside(container, "-m", "train.evaluate", tmp_path / "quickstart", "--probe", "knn", "linear")
    assert done.returncode == 0, done.stderr
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (container / name).exists():
            print(f"\nat most {int((container / name).read_text()) / 1e6:,.0f} MB with the page cache")
