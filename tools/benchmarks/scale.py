"""Start-up time and memory at the size of ImageNet: every stage from an index and its tars to the first batch."""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from PIL import Image

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.memory import peak_memory
from pipeline.order import Plan
from pipeline.shards.index import SAMPLE_DTYPE, open_index, save_index, write_dali_indices
from pipeline.shards.index_file import SAMPLES_NAME
from pipeline.window import WINDOW_ROWS
from tools.benchmarks.measure import resident_bytes, table
from tools.own_process import run_in_subprocess
from tools.shards.writer import tar_header

SHARD_SIZE = 1000  # samples
SAMPLE_STRIDE = 110_592  # bytes from one sample to the next, as with ImageNet's photographs
REAL_BATCHES = 8  # batches with real pixels in the otherwise empty tars


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    if options.samples < REAL_BATCHES * options.batch:
        raise ValueError(f"--samples: {options.samples}, must be at least {REAL_BATCHES} batches of {options.batch}")
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        folder = Path(temporary)
        make_empty_shards(folder, options.samples, SHARD_SIZE, options.batch)
        figures = run_in_subprocess(measure_loader, folder, options.batch)
    cells = [(name[:-2], f"{value * 1e3:,.1f} ms") for name, value in figures.items() if name.endswith("_s")]
    cells += [(name[:-6], f"{value / 1e6:,.1f} MB") for name, value in figures.items() if name.endswith("_bytes")]
    head = [f"{figures['samples']:,} samples in {figures['shards']:,} shards", ""]
    print(table(head, ((name.replace("_", " "), value) for name, value in cells)))
    return figures


def make_empty_shards(folder: Path, num_samples: int, shard_size: int, batch: int) -> None:
    """Write an index, and sparse tars with the images of the first batches and those that opening the data set looks at."""
    noise = np.random.default_rng(0).integers(0, 255, (47, 63, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(encoded, "JPEG", quality=90)
    image = encoded.getvalue()
    rows = np.zeros(num_samples, SAMPLE_DTYPE)
    rows["shard"], places = np.divmod(np.arange(num_samples), shard_size)
    rows["offset"] = places * SAMPLE_STRIDE + BLOCKSIZE
    rows["size"], rows["height"], rows["width"] = len(image), 375, 500
    names = [f"train-{shard:06d}.tar" for shard in range(int(rows["shard"][-1]) + 1)]
    save_index(folder, names, rows)
    counts = np.bincount(rows["shard"])
    ends = np.cumsum(counts)
    # The first batches need pixels; opening the data set looks at the first and the last sample of each shard.
    real = Plan(counts, 0).rows(0, 0, REAL_BATCHES * batch)
    for shard, name in enumerate(names):
        with (folder / name).open("wb") as tar:
            tar.truncate(int(counts[shard]) * SAMPLE_STRIDE + 2 * BLOCKSIZE)
            first = ends[shard] - counts[shard]
            for row in (first, ends[shard] - 1, *real[(real >= first) & (real < ends[shard])]):
                tar.seek(int(rows["offset"][row]) - BLOCKSIZE)
                tar.write(tar_header(f"{row:09d}.jpg", len(image)) + image)


def measure_loader(folder: Path, batch: int) -> dict[str, Any]:
    """Measure each stage from an index and its tars to the first batch of 2 + 6 crops."""
    figures: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        figures[f"{name}_s"] = time.perf_counter() - start
        return result

    before = resident_bytes()
    index = timed("open_index", lambda: open_index(folder))
    figures |= {"samples": len(index), "shards": len(index.shards), "index_memory_bytes": resident_bytes() - before}
    figures["index_file_bytes"] = (folder / SAMPLES_NAME).stat().st_size
    plan = Plan(index.counts, 0)
    timed("plan_of_first_batch", lambda: plan.rows(0, 0, batch))
    rows = timed("plan_of_epoch", lambda: plan.rows(0, 0, len(index)))
    with tempfile.TemporaryDirectory() as temporary:
        window = rows[:WINDOW_ROWS]
        timed("dali_index_files_of_a_window", lambda: write_dali_indices(index, window, Path(temporary)))
    dataset = build_multicrop_dataset("custom", folder)
    loader = timed("loader", lambda: build_multicrop_dataloader(dataset, batch, device="cpu"))
    timed("first_batch", lambda: next(iter(loader)))
    figures["peak_memory_bytes"] = peak_memory()
    return figures
