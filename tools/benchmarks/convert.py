"""Images per second of make_shards, against webdataset.ShardWriter and a plain copy of the same files."""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.measure import interleave, table
from tools.benchmarks.photographs import memory_folder, write_photographs
from tools.shards.convert import ConvertOptions, convert
from tools.shards.images import ImagePolicy
from tools.shards.layouts.source import open_source

NUM_SHARDS = 4
Writer = Callable[[Path, Path, int], object]


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        root = Path(folder)
        write_photographs(root / "source", options.images)
        work = {name: partial(images_per_s, writer, root, options) for name, writer in WRITERS.items()}
        rates = {name: statistics.median(rounds) for name, rounds in interleave(work, options.rounds).items()}
    print(f"{options.images} JPEGs, {options.workers} workers, in {Path(folder).parent}, cache warm")
    rows = ((name, f"{rate:,.0f}", *(f"{rate / rates[key]:.2f}" for key in BASELINES)) for name, rate in rates.items())
    print(table(["row", "images/s", *(f"to {name}" for name in BASELINES)], rows))
    figures: dict[str, Any] = {name: {"images_per_s": round(rate, 1)} for name, rate in rates.items()}
    return figures | {"images": options.images, "workers": options.workers}


def images_per_s(writer: Writer, root: Path, options: argparse.Namespace) -> float:
    shutil.rmtree(root / "out", ignore_errors=True)
    os.sync()  # unwritten bytes of the previous row do not count here
    start = time.perf_counter()
    writer(root / "source", root / "out", options.workers)
    os.sync()  # every row ends when its bytes are on disk; only ours flushes them itself
    return options.images / (time.perf_counter() - start)


def write_ours(policy: ImagePolicy, source: Path, out: Path, workers: int) -> None:
    options = ConvertOptions(policy=policy, workers=workers, num_shards=NUM_SHARDS)
    convert(open_source(source, "train"), out, "train", options)


def write_webdataset(source: Path, out: Path, workers: int) -> None:
    from webdataset import ShardWriter

    out.mkdir()
    catalogue = open_source(source, "train").catalogue
    order = np.random.default_rng(0).permutation(len(catalogue))
    with ShardWriter(str(out / "%06d.tar"), maxcount=len(order) // NUM_SHARDS, verbose=0) as writer:
        for position, row in enumerate(order.tolist()):
            writer.write({"__key__": f"{position:09d}", "jpg": catalogue.read(row), "cls": catalogue.label[row]})


WRITERS: dict[str, Writer] = {
    "passthrough": partial(write_ours, ImagePolicy()),
    "resize": partial(write_ours, ImagePolicy(resize=256)),
    "shardwriter": write_webdataset,
    "copy": lambda source, out, _: shutil.copytree(source, out),
}
BASELINES = ("shardwriter", "copy")
