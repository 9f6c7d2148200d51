"""Start-up time and memory at the size of ImageNet, from an index and its tars to the first batch."""

import argparse
import io
import resource
import tempfile
import time
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from PIL import Image

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.order import Plan
from pipeline.shards.index import SAMPLE_DTYPE, save_index
from tools.benchmarks.measure import table
from tools.own_process import run_in_subprocess
from tools.shards.writer import tar_header

SHARD_SIZE = 1000  # samples
SAMPLE_STRIDE = 110_592  # bytes from one sample to the next, as with ImageNet's photographs
REAL_BATCHES = 8  # batches with real pixels in the otherwise empty tars


def run_benchmark(options: argparse.Namespace) -> dict[str, float]:
    if options.samples < REAL_BATCHES * options.batch:
        raise ValueError(f"--samples: {options.samples}, must be at least {REAL_BATCHES} batches of {options.batch}")
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        make_empty_shards(Path(temporary), options.samples, options.batch)
        figures = run_in_subprocess(measure_start, Path(temporary), options.batch)
    print(table([f"{options.samples:,} samples", ""], ((name, f"{value:,.1f}") for name, value in figures.items())))
    return figures


def make_empty_shards(folder: Path, num_samples: int, batch: int) -> None:
    """Write an index, and sparse tars with the images of the first batches and those that opening the data set looks at."""
    encoded = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (47, 63, 3), np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(encoded, "JPEG", quality=90)
    image = encoded.getvalue()
    rows = np.zeros(num_samples, SAMPLE_DTYPE)
    rows["shard"], places = np.divmod(np.arange(num_samples), SHARD_SIZE)
    rows["offset"] = places * SAMPLE_STRIDE + BLOCKSIZE
    rows["size"], rows["height"], rows["width"] = len(image), 375, 500
    counts = np.bincount(rows["shard"])
    names = [f"train-{shard:06d}.tar" for shard in range(len(counts))]
    save_index(folder, names, rows)
    # The first batches need pixels; opening the data set looks at the first and the last sample of each shard.
    ends = np.cumsum(counts)
    real = rows[np.unique([*Plan(counts, 0).rows(0, 0, REAL_BATCHES * batch), *(ends - counts), *(ends - 1)])]
    for shard, name in enumerate(names):
        with (folder / name).open("wb") as tar:
            tar.truncate(int(counts[shard]) * SAMPLE_STRIDE + 2 * BLOCKSIZE)
            for offset in real["offset"][real["shard"] == shard].tolist():
                tar.seek(offset - BLOCKSIZE)
                tar.write(tar_header("image.jpg", len(image)) + image)


def measure_start(folder: Path, batch: int) -> dict[str, Any]:
    """Measure the stages up to the first batch of 2 + 6 crops."""
    started = time.perf_counter()
    dataset = build_multicrop_dataset("custom", folder)
    opened = time.perf_counter()
    Plan(dataset.index.counts, 0).rows(0, 0, len(dataset))
    planned = time.perf_counter()
    next(iter(build_multicrop_dataloader(dataset, batch, device="cpu")))
    return {
        "open the data set, ms": 1e3 * (opened - started),
        "plan an epoch, ms": 1e3 * (planned - opened),
        "first batch, ms": 1e3 * (time.perf_counter() - planned),
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
