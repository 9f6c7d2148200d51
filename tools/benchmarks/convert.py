"""Images per second of make_shards, against webdataset.ShardWriter and a plain copy of the same files."""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.photographs import HEIGHT, NUM_CLASSES, WIDTH, memory_folder, photographs
from tools.benchmarks.tables import table
from tools.shards.convert import ConvertOptions, convert
from tools.shards.images import ImagePolicy
from tools.shards.layouts.source import open_source

NUM_DISTINCT = 64


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--images",
        type=int,
        default=4096,
        help="How many, of 500x375 pixels and about 100 KB. The default is %(default)s.",
    )
    command.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="How often to convert; the median is printed. The default is %(default)s.",
    )
    command.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="The processes. The default is one per core."
    )
    command.add_argument(
        "--folder", type=Path, default=memory_folder(), help="Where to write. The default is %(default)s."
    )


def run(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        num_bytes = make_source(root / "source", given.images)
        rows = {name: measure(work, root, given) for name, work in WORK.items()}
    place = given.folder or tempfile.gettempdir()
    size = f"{WIDTH}x{HEIGHT}, {num_bytes / 1e6:.0f} MB"
    print(f"{given.images} JPEG of {size}, {given.workers} workers, in {place}, cache warm")
    mb = num_bytes / given.images / 1e6
    shown = (
        (name, f"{rate:,.0f}", f"{rate * mb:,.0f}", f"{rate / rows['shardwriter']:.2f}", f"{rate / rows['copy']:.2f}")
        for name, rate in rows.items()
    )
    print(table(["row", "images/s", "MB/s", "/ shardwriter", "/ copy"], shown))
    figures: dict[str, Any] = {name: {"images_per_s": round(rate, 1)} for name, rate in rows.items()}
    return figures | {"images": given.images, "bytes": num_bytes, "workers": given.workers}


def measure(work: Callable[[Path, Path, int], None], root: Path, given: argparse.Namespace) -> float:
    """Images per second, the median of the repeats, each into a new folder."""
    rates = []
    for _ in range(given.repeats):
        shutil.rmtree(root / "out", ignore_errors=True)
        os.sync()  # unwritten bytes of the run before do not count here
        start = time.perf_counter()
        work(root / "source", root / "out", given.workers)
        os.sync()  # every row ends when its bytes are on disk; only ours flushes them itself
        rates.append(given.images / (time.perf_counter() - start))
    return statistics.median(rates)


def make_source(folder: Path, num_images: int) -> int:
    """Class folders of photographs, no two files alike; returns their bytes."""
    pictures, total = list(photographs(NUM_DISTINCT)), 0
    for number in range(num_images):
        path = folder / f"class{number % NUM_CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        comment = b"\xff\xfe\x00\x0a%08d" % number
        content = pictures[number % NUM_DISTINCT]
        total += path.write_bytes(content[:2] + comment + content[2:])
    return total


def _convert(policy: ImagePolicy) -> Callable[[Path, Path, int], None]:
    def work(source: Path, out: Path, workers: int) -> None:
        options = ConvertOptions(policy=policy, workers=workers, num_shards=4)
        convert(open_source(source, "train"), out, "train", options)

    return work


def _shardwriter(source: Path, out: Path, workers: int) -> None:
    from webdataset import ShardWriter

    out.mkdir()
    catalogue = open_source(source, "train").catalogue
    order = np.random.default_rng(0).permutation(len(catalogue))
    with ShardWriter(str(out / "%06d.tar"), maxcount=len(order) // 4, verbose=0) as writer:
        for position, row in enumerate(order.tolist()):
            writer.write({"__key__": f"{position:09d}", "jpg": catalogue.read(row), "cls": catalogue.label[row]})


def _copy(source: Path, out: Path, workers: int) -> None:
    shutil.copytree(source, out)


WORK = {
    "passthrough": _convert(ImagePolicy()),
    "verify-full": _convert(ImagePolicy(verify="full")),
    "resize": _convert(ImagePolicy(resize=256)),
    "shardwriter": _shardwriter,
    "copy": _copy,
}
