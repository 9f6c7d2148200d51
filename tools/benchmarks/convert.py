"""Images per second of make_shards, against webdataset.ShardWriter and a plain copy of the same files."""

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.shards.convert import ConvertOptions, convert
from tools.shards.images import ImagePolicy
from tools.shards.layouts.source import open_source

WIDTH, HEIGHT = 500, 375  # the usual ImageNet photograph
NUM_CLASSES = 16
NUM_DISTINCT = 64


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=int, default=4096, help="of 500x375, about 100 KB each; default: %(default)s")
    command.add_argument("--repeats", type=int, default=3, help="the median is printed; default: %(default)s")
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    # In memory by default: on a shared disk the same row varied by a factor of four from run to run.
    shared = Path("/dev/shm")
    command.add_argument(
        "--folder", type=Path, default=shared if shared.is_dir() else None, help="default: %(default)s"
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        root = Path(folder)
        num_bytes = make_source(root / "source", parsed.images)
        rows = {name: measure(work, root, parsed) for name, work in WORK.items()}
    place = parsed.folder or tempfile.gettempdir()
    size = f"{WIDTH}x{HEIGHT}, {num_bytes / 1e6:.0f} MB"
    print(f"{parsed.images} JPEG of {size}, {parsed.workers} workers, in {place}, cache warm")
    print(f"{'row':12} {'img/s':>8} {'MB/s':>7} {'/ shardwriter':>14} {'/ copy':>7}")
    for name, rate in rows.items():
        mb = rate * num_bytes / parsed.images / 1e6
        print(f"{name:12} {rate:8,.0f} {mb:7,.0f} {rate / rows['shardwriter']:14.2f} {rate / rows['copy']:7.2f}")
    figures: dict[str, Any] = {name: {"images_per_s": round(rate, 1)} for name, rate in rows.items()}
    return figures | {"images": parsed.images, "bytes": num_bytes, "workers": parsed.workers}


def measure(work: Callable[[Path, Path, int], None], root: Path, parsed: argparse.Namespace) -> float:
    """Images per second, the median of the repeats, each into a new folder."""
    rates = []
    for _ in range(parsed.repeats):
        shutil.rmtree(root / "out", ignore_errors=True)
        os.sync()  # what the run before left to write is not this one's
        start = time.perf_counter()
        work(root / "source", root / "out", parsed.workers)
        os.sync()  # every row counts until its bytes are on disk, as only ours sees to itself
        rates.append(parsed.images / (time.perf_counter() - start))
    return statistics.median(rates)


def make_source(folder: Path, num_images: int) -> int:
    """Class folders of photograph-like JPEGs, no two files alike; returns their bytes."""
    rng = np.random.default_rng(0)
    pictures = [_picture(rng) for _ in range(NUM_DISTINCT)]
    total = 0
    for number in range(num_images):
        path = folder / f"class{number % NUM_CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        comment = b"\xff\xfe\x00\x0a%08d" % number
        content = pictures[number % NUM_DISTINCT]
        total += path.write_bytes(content[:2] + comment + content[2:])
    return total


def _picture(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    fine = np.asarray(coarse, np.float32) + rng.normal(0, 14, (HEIGHT, WIDTH, 1))
    out = io.BytesIO()
    Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


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
