"""Start-up time and memory at ImageNet's size, and how they grow to a billion samples."""

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.order import Plan
from pipeline.shards.index import SAMPLE_DTYPE, open_index, save_index
from pipeline.shards.index_file import SAMPLES_NAME, load_index
from tools.benchmarks.tables import table
from tools.own_process import own_process
from tools.shards.writer import BLOCK, tar_header

IMAGENET = 1_281_167
LARGER = (10_000_000, 100_000_000, 1_000_000_000)
LARGEST_FILE = 10_000_000  # samples of an index that is really written, 0.3 GB; beyond, the plan alone is measured
SAMPLE_STRIDE = 110_592  # bytes from one sample to the next: those of ImageNet's photographs
BATCHES_AHEAD = 8  # of which there are real pixels in the otherwise empty tars
SLICES = 20


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--samples", type=int, default=IMAGENET, help="The samples of the data set. The default is %(default)s."
    )
    command.add_argument(
        "--shard-size", type=int, default=1000, help="The samples of a shard. The default is %(default)s."
    )
    command.add_argument("--batch", type=int, default=64, help="The images of a batch. The default is %(default)s.")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    if given.samples < BATCHES_AHEAD * given.batch:
        raise ValueError(f"--samples: {given.samples}, must be at least {BATCHES_AHEAD} batches of {given.batch}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        folder = Path(temporary)
        make_empty_shards(folder, given.samples, given.shard_size, given.batch)
        rows.append(_alone(measure_loader, folder, given.batch))
    rows += [_alone(measure_larger, size, given.shard_size) for size in LARGER]
    for row in rows:
        shown = ((name.rpartition("_")[0].replace("_", " "), _shown(name, value)) for name, value in row.items())
        print(
            table([f"{row['samples']:,} samples in {row['shards']:,} shards", ""], (line for line in shown if line[1]))
        )
    return rows


def _shown(name: str, value: Any) -> str:
    if name.endswith("_s"):
        return f"{value * 1e3:,.1f} ms"
    return f"{value / 1e6:,.1f} MB" if name.endswith("_bytes") else ""


def _alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with own_process() as worker:
        return worker.submit(measure, *arguments).result()


def sample_rows(num_samples: int, shard_size: int, image_bytes: int) -> np.ndarray:
    rows = np.zeros(num_samples, SAMPLE_DTYPE)
    rows["shard"], place = np.divmod(np.arange(num_samples), shard_size)
    rows["offset"] = place * SAMPLE_STRIDE + BLOCK
    rows["size"], rows["height"], rows["width"] = image_bytes, 375, 500
    return rows


def make_empty_shards(folder: Path, num_samples: int, shard_size: int, batch: int) -> None:
    """An index, and sparse tars that hold what the start looks at and the images of the first batches."""
    noise = np.random.default_rng(0).integers(0, 255, (47, 63, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(encoded, "JPEG", quality=90)
    image = encoded.getvalue()
    rows = sample_rows(num_samples, shard_size, len(image))
    names = [f"train-{shard:06d}.tar" for shard in range(int(rows["shard"][-1]) + 1)]
    save_index(folder, names, rows)
    counts = np.bincount(rows["shard"])
    ends = np.cumsum(counts)
    wanted = Plan(counts, 0).rows(0, 0, BATCHES_AHEAD * batch)
    for shard, name in enumerate(names):
        with (folder / name).open("wb") as tar:
            tar.truncate(int(counts[shard]) * SAMPLE_STRIDE + 2 * BLOCK)
            inside = wanted[(wanted >= ends[shard] - counts[shard]) & (wanted < ends[shard])]
            for row in (ends[shard] - counts[shard], ends[shard] - 1, *inside):
                tar.seek(int(rows["offset"][row]) - BLOCK)
                tar.write(tar_header(f"{row:09d}.jpg", len(image)) + image)


def measure_loader(folder: Path, batch: int) -> dict[str, Any]:
    """From an index and its tars to the first batch of 2 + 6 crops."""
    from pipeline import build_multicrop_dataloader, build_multicrop_dataset
    from pipeline.shards.dali_index import write_dali_indices
    from pipeline.window import WINDOW_ROWS

    before = _resident_bytes()
    index, open_s = _timed(lambda: open_index(folder))
    index_bytes = _resident_bytes() - before
    plan = Plan(index.counts, 0)
    _, first_plan_s = _timed(lambda: plan.rows(0, 0, batch))
    rows, epoch_plan_s = _timed(lambda: plan.rows(0, 0, len(index)))
    assert len(np.unique(rows)) == len(index)
    with tempfile.TemporaryDirectory() as temporary:
        window = rows[:WINDOW_ROWS]
        _, window_s = _timed(lambda: write_dali_indices(index, window, Path(temporary)))
    dataset = build_multicrop_dataset("custom", folder)
    loader, loader_s = _timed(lambda: build_multicrop_dataloader(dataset, batch, device="cpu"))
    crops, batch_s = _timed(lambda: next(iter(loader)))
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


def measure_larger(num_samples: int, shard_size: int) -> dict[str, Any]:
    """The plan at random places of an epoch, and the opening of the index where it is small enough to be written."""
    row: dict[str, Any] = {"name": "simulated", "samples": num_samples, "shards": -(-num_samples // shard_size)}
    row["index_file_bytes"] = num_samples * SAMPLE_DTYPE.itemsize
    if num_samples <= LARGEST_FILE:
        with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
            folder = Path(temporary)
            names = [f"train-{shard:06d}.tar" for shard in range(row["shards"])]
            save_index(folder, names, sample_rows(num_samples, shard_size, 10_000))
            before = _resident_bytes()
            (_, samples, _), row["open_index_file_s"] = _timed(lambda: load_index(folder, ""))
            assert int(samples["shard"][-1]) == row["shards"] - 1
            row["index_memory_bytes"] = _resident_bytes() - before
    before = _resident_bytes()
    sizes = np.full(row["shards"], shard_size, np.int64)
    sizes[-1] -= shard_size * len(sizes) - num_samples
    plan, rng, times = Plan(sizes, 0), np.random.default_rng(0), []
    for epoch, start in enumerate(rng.integers(0, num_samples - 1024, SLICES).tolist()):
        _, seconds = _timed(partial(plan.rows, epoch, start, start + 1024))
        times.append(seconds)
    row["plan_of_a_batch_anywhere_s"] = statistics.median(times)
    row["plan_memory_bytes"] = _resident_bytes() - before
    return row


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
