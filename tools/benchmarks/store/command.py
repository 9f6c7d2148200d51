"""Shards from an S3 store against the same ones on the local disk: images/s, requests, and the wait, cold and warm.

The store is moto's on the loopback, behind a line of a given speed that counts requests. `line` is what this line could give at
most: the images of all shards over the time that the same line takes for their bytes. A cold cache can be no faster than the
line, and a warm one no slower than the disk; the crops of the last shard come after the line has done its part. The rows take
turns; figures are medians over the rounds.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import ShardIndex, open_index
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.store.line import Line, environment, moto_server, put_folder
from tools.benchmarks.tables import table, target

WARM, COLD, BYTES_PER_REQUEST = 0.97, 0.9, 64e6
IMAGES_IN_SHARD = 720  # about 67 MB
ROWS = ("local", "line", "cold", "warm")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--shards", type=Path, metavar="DIR", help="Read these shards. By default photographs of about 100 KB are made."
    )
    add("--images", type=int, default=6 * IMAGES_IN_SHARD, help="How many images to make. The default is %(default)s.")
    add(
        "--streams",
        type=int,
        default=CacheSettings.streams,
        help="How many downloads at once. The default is %(default)s.",
    )
    add("--line", type=int, default=10, metavar="MB/S", help="The speed of the line. The default is %(default)s.")
    add("--rounds", type=int, default=3, help="How often each row is measured. The default is %(default)s.")
    add("--batch", type=int, default=32, help="The images of a batch. The default is %(default)s.")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    threads = len(os.sched_getaffinity(0))
    with (
        benchmark_shards(given.shards, given.images, threads, max(1, given.images // IMAGES_IN_SHARD)) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent) as cache,
        moto_server() as server,
        Line(server, given.line * 1e6) as line,
        environment(line.url),
    ):
        url, local = put_folder(server, folder, "set/train"), open_index(folder)
        prefix = url.removesuffix("/train")
        num_bytes = sum(local.shard_path(shard).stat().st_size for shard in range(len(local.shards)))
        print(
            f"{len(local):,} images in {len(local.shards)} shards, {num_bytes / 1e6:,.0f} MB; a line of {given.line} MB/s; "
            f"{threads} threads, batches of {given.batch}",
            flush=True,
        )
        epoch(folder, given.batch, line, CacheSettings(Path(cache)))  # compiles the crops, reads the disk
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
        for _ in range(given.rounds):
            shutil.rmtree(cache)
            measured["local"].append(
                epoch(folder, given.batch, line, CacheSettings(Path(cache), streams=given.streams))
            )
            measured["line"].append(bare_line(local, url, line))
            measured["cold"].append(epoch(prefix, given.batch, line, CacheSettings(Path(cache), streams=given.streams)))
            measured["warm"].append(epoch(prefix, given.batch, line, CacheSettings(Path(cache), streams=given.streams)))
    rows = [{"name": name, **_medians(measured[name])} for name in ROWS]
    print_rows(rows, measured, len(local), num_bytes)
    return rows


def epoch(place: Path | str, batch_size: int, line: Line, cache: CacheSettings) -> dict[str, float]:
    """One epoch, from opening the data set on."""
    before, started = len(line.requests), time.perf_counter()
    dataset = build_multicrop_dataset(
        "custom", place, num_global_crops=1, num_local_crops=0, global_crop_size=64
    ).cached(cache)
    loader = build_multicrop_dataloader(dataset, batch_size, device="cpu", normalized=False, drop_last=False)
    images = sum(len(batch.labels) for batch in loader)
    seconds = time.perf_counter() - started
    loader.close()
    return {
        "images_per_s": images / seconds,
        "requests": len(line.requests) - before,
        "shard_requests": sum(".tar" in request for request in line.requests[before:]),
        "store_wait_percent": 100 * loader.store_wait_s / seconds,
    }


def bare_line(index: ShardIndex, url: str, line: Line) -> dict[str, float]:
    """All shards one after the other over the same line, by the simplest client."""
    started = time.perf_counter()
    for name in index.shards:
        with urlopen(f"{line.url}/{url.removeprefix('s3://')}/{name}") as answer:
            while answer.read(1 << 20):
                pass
    seconds = time.perf_counter() - started
    return {
        "images_per_s": len(index) / seconds,
        "requests": len(index.shards),
        "shard_requests": len(index.shards),
        "store_wait_percent": 0.0,
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def print_rows(
    rows: list[dict[str, Any]], measured: dict[str, list[dict[str, float]]], num_images: int, num_bytes: int
) -> None:
    head = ("row", "images/s", "requests", "requests/image", "waited for the store")
    cells = (
        [row["name"], f"{row['images_per_s']:,.1f}", f"{row['requests']:.0f}", f"{row['requests'] / num_images:.5f}",
         f"{row['store_wait_percent']:.1f} %"]
        for row in rows
    )  # fmt: skip
    print(table(head, cells))

    def ratio(name: str, *others: str) -> float:
        """The median over the rounds of a row over the slowest of the others."""
        rate = {key: [figures["images_per_s"] for figures in measured[key]] for key in (name, *others)}
        return statistics.median(
            own / min(others) for own, *others in zip(rate[name], *(rate[key] for key in others), strict=True)
        )

    cold = next(row for row in rows if row["name"] == "cold")
    print(target("images_per_s warm / local", ratio("warm", "local"), ">=", WARM))
    print(target("images_per_s cold / slower of line and local", ratio("cold", "line", "local"), ">=", COLD))
    print(f"requests to open the data set, once: {cold['requests'] - cold['shard_requests']:.0f}")
    print(
        target(
            "requests for each 64 MB of shards, cold",
            cold["shard_requests"] / (num_bytes / BYTES_PER_REQUEST),
            "<=",
            1.0,
        )
    )
