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
from tools.benchmarks.photographs import HEIGHT, NUM_CLASSES, WIDTH, memory_folder, photographs
from tools.shards.convert import ConvertOptions, convert
from tools.shards.images import ImagePolicy
from tools.shards.layouts.source import open_source

NUM_DISTINCT = 64
NUM_SHARDS = 4
Writer = Callable[[Path, Path, int], object]


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    parent = options.folder or memory_folder()
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        root = Path(folder)
        num_bytes = make_source(root / "source", options.images)
        work = {name: partial(images_per_s, writer, root, options) for name, writer in WRITERS.items()}
        rates = {name: statistics.median(rounds) for name, rounds in interleave(work, options.rounds).items()}
    size = f"{WIDTH}x{HEIGHT}, {num_bytes / 1e6:.0f} MB"
    where = parent or tempfile.gettempdir()
    print(f"{options.images} JPEG of {size}, {options.workers} workers, in {where}, cache warm")
    mb = num_bytes / options.images / 1e6
    cells = (
        (name, f"{rate:,.0f}", f"{rate * mb:,.0f}", *(f"{rate / rates[key]:.2f}" for key in ("shardwriter", "copy")))
        for name, rate in rates.items()
    )
    print(table(["row", "images/s", "MB/s", "to shardwriter", "to copy"], cells))
    figures: dict[str, Any] = {name: {"images_per_s": round(rate, 1)} for name, rate in rates.items()}
    return figures | {"images": options.images, "bytes": num_bytes, "workers": options.workers}


def images_per_s(writer: Writer, root: Path, options: argparse.Namespace) -> float:
    shutil.rmtree(root / "out", ignore_errors=True)
    os.sync()  # unwritten bytes of the previous row do not count here
    start = time.perf_counter()
    writer(root / "source", root / "out", options.workers)
    os.sync()  # every row ends when its bytes are on disk; only ours flushes them itself
    return options.images / (time.perf_counter() - start)


def make_source(folder: Path, num_images: int) -> int:
    """Write class folders of photographs, no two files alike, and return their total bytes."""
    pictures, total = list(photographs(NUM_DISTINCT)), 0
    for number in range(num_images):
        path = folder / f"class{number % NUM_CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        comment = b"\xff\xfe\x00\x0a%08d" % number
        content = pictures[number % NUM_DISTINCT]
        total += path.write_bytes(content[:2] + comment + content[2:])
    return total


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
    "verify-full": partial(write_ours, ImagePolicy(verify="full")),
    "resize": partial(write_ours, ImagePolicy(resize=256)),
    "shardwriter": write_webdataset,
    "copy": lambda source, out, _: shutil.copytree(source, out),
}
