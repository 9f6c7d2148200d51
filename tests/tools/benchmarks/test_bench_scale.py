"""The empty shards of `bench.py scale` are enough to start a loader."""

from pathlib import Path

from tools.benchmarks.scale import make_empty_shards, measure_start


def test_a_loader_starts_on_empty_shards(tmp_path: Path) -> None:
    make_empty_shards(tmp_path, num_samples=2050, batch=8)
    assert (tmp_path / "train-000000.tar").stat().st_size > 100_000_000
    assert sum(tar.stat().st_blocks for tar in tmp_path.glob("*.tar")) * 512 < 10_000_000  # holes take no room
    assert all(value > 0 for value in measure_start(tmp_path, 8).values())
