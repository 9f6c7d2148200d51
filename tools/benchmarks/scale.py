"""Start-up time and memory at the size of ImageNet, and how they grow to a billion samples."""

import argparse
import io
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tarfile import BLOCKSIZE as BLOCK
from typing import Any

import numpy as np
from PIL import Image

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.order import Plan
from pipeline.shards.index import SAMPLE_DTYPE, open_index, save_index, write_dali_indices
from pipeline.shards.index_file import SAMPLES_NAME
from pipeline.window import WINDOW_ROWS
from tools.benchmarks.measure import resident_bytes, table
from tools.own_process import run_in_subprocess
from tools.shards.writer import tar_header

LARGER = (10_000_000, 100_000_000, 1_000_000_000)
SAMPLE_STRIDE = 110_592  # bytes from one sample to the next, as with ImageNet's photographs
REAL_BATCHES = 8  # batches with real pixels in the otherwise empty tars
NUM_SLICES, SLICE_ROWS = 20, 1024


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.samples < REAL_BATCHES * options.batch:
        raise ValueError(f"--samples: {options.samples}, must be at least {REAL_BATCHES} batches of {options.batch}")
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        folder = Path(temporary)
        make_empty_shards(folder, options.samples, options.shard_size, options.batch)
        rows = [run_in_subprocess(measure_loader, folder, options.batch)]
    rows += [run_in_subprocess(measure_plan, size, options.shard_size) for size in LARGER]
    for row in rows:
        cells = [(key[:-2].replace("_", " "), f"{row[key] * 1e3:,.1f} ms") for key in row if key.endswith("_s")]
        cells += [(key[:-6].replace("_", " "), f"{row[key] / 1e6:,.1f} MB") for key in row if key.endswith("_bytes")]
        print(table([f"{row['samples']:,} samples in {row['shards']:,} shards", ""], cells))
    return rows


def make_empty_shards(folder: Path, num_samples: int, shard_size: int, batch: int) -> None:
    """Write an index, and sparse tars with the images of the first batches and those that opening the data set looks at."""
    noise = np.random.default_rng(0).integers(0, 255, (47, 63, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(encoded, "JPEG", quality=90)
    image = encoded.getvalue()
    rows = np.zeros(num_samples, SAMPLE_DTYPE)
    rows["shard"], places = np.divmod(np.arange(num_samples), shard_size)
    rows["offset"] = places * SAMPLE_STRIDE + BLOCK
    rows["size"], rows["height"], rows["width"] = len(image), 375, 500
    names = [f"train-{shard:06d}.tar" for shard in range(int(rows["shard"][-1]) + 1)]
    save_index(folder, names, rows)
    counts = np.bincount(rows["shard"])
    ends = np.cumsum(counts)
    # The first batches need pixels; opening the data set looks at the first and the last sample of each shard.
    real = Plan(counts, 0).rows(0, 0, REAL_BATCHES * batch)
    for shard, name in enumerate(names):
        with (folder / name).open("wb") as tar:
            tar.truncate(int(counts[shard]) * SAMPLE_STRIDE + 2 * BLOCK)
            first = ends[shard] - counts[shard]
            for row in (first, ends[shard] - 1, *real[(real >= first) & (real < ends[shard])]):
                tar.seek(int(rows["offset"][row]) - BLOCK)
                tar.write(tar_header(f"{row:09d}.jpg", len(image)) + image)


def measure_loader(folder: Path, batch: int) -> dict[str, Any]:
    """Measure each stage from an index and its tars to the first batch of 2 + 6 crops."""
    before = resident_bytes()
    index, open_s = timed(lambda: open_index(folder))
    index_bytes = resident_bytes() - before
    plan = Plan(index.counts, 0)
    _, first_plan_s = timed(lambda: plan.rows(0, 0, batch))
    rows, epoch_plan_s = timed(lambda: plan.rows(0, 0, len(index)))
    assert len(np.unique(rows)) == len(index)
    with tempfile.TemporaryDirectory() as temporary:
        _, window_s = timed(lambda: write_dali_indices(index, rows[:WINDOW_ROWS], Path(temporary)))
    dataset = build_multicrop_dataset("custom", folder)
    loader, loader_s = timed(lambda: build_multicrop_dataloader(dataset, batch, device="cpu"))
    crops, batch_s = timed(lambda: next(iter(loader)))
    assert len(crops.crops) == 8
    return {
        "name": "loader",
        "samples": len(index),
        "shards": len(index.shards),
        "index_file_bytes": (folder / SAMPLES_NAME).stat().st_size,
        "open_index_s": open_s,
        "index_memory_bytes": index_bytes,
        "plan_of_first_batch_s": first_plan_s,
        "plan_of_epoch_s": epoch_plan_s,
        "dali_index_files_of_a_window_s": window_s,
        "loader_s": loader_s,
        "first_batch_s": batch_s,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_plan(num_samples: int, shard_size: int) -> dict[str, Any]:
    """Measure the plan at random places of an epoch; it needs the sizes of the shards but no index."""
    before, num_shards = resident_bytes(), -(-num_samples // shard_size)
    sizes = np.full(num_shards, shard_size, np.int64)
    sizes[-1] -= shard_size * num_shards - num_samples
    plan, rng = Plan(sizes, 0), np.random.default_rng(0)
    starts = rng.integers(0, num_samples - SLICE_ROWS, NUM_SLICES).tolist()
    times = [timed(partial(plan.rows, epoch, start, start + SLICE_ROWS))[1] for epoch, start in enumerate(starts)]
    return {
        "name": "simulated",
        "samples": num_samples,
        "shards": num_shards,
        "index_file_bytes": num_samples * SAMPLE_DTYPE.itemsize,
        "plan_of_a_batch_anywhere_s": statistics.median(times),
        "plan_memory_bytes": resident_bytes() - before,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start
