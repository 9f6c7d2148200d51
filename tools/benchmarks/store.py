"""Images per second, requests and waiting time of shards in an S3 store, against the same shards on a local disk.

The store is moto's on the loopback, behind a proxy of a given bandwidth that counts requests. The row `network` is computed:
all images over the time that the bandwidth allows for their bytes. With a cold cache, training can be no faster than that, and
with a warm one it should be as fast as the local disk. Rows are interleaved; figures are medians over the rounds.
"""

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

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import open_index
from tools.benchmarks.measure import interleave, median_ratio, table, target
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.proxy import ThrottledProxy, environment, moto_server, put_folder

MIN_WARM, MIN_COLD, BYTES_PER_REQUEST = 0.97, 0.9, 64e6
IMAGES_PER_SHARD = 720  # about 67 MB


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    threads, num_shards = len(os.sched_getaffinity(0)), max(1, options.images // IMAGES_PER_SHARD)
    with (
        benchmark_shards(options.shards, options.images, threads, num_shards) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent) as cache_folder,
        moto_server() as server,
        ThrottledProxy(server, options.bandwidth * 1e6) as proxy,
        environment(proxy.url),
    ):
        url, local, cache = put_folder(server, folder, "bench/train"), open_index(folder), Path(cache_folder)
        num_bytes = sum(local.shard_path(shard).stat().st_size for shard in range(len(local.shards)))
        print(
            f"{len(local):,} images in {len(local.shards)} shards, {num_bytes / 1e6:,.0f} MB; {options.bandwidth} MB/s; "
            f"{threads} threads, batches of {options.batch}",
            flush=True,
        )
        settings = CacheSettings(cache, streams=options.streams)
        from_store = partial(read_epoch, url.removesuffix("/train"), options.batch, proxy, settings)
        from_disk = partial(read_epoch, folder, options.batch, proxy, settings)
        from_disk()  # compiles the crop operator and warms the page cache

        def cold() -> dict[str, float]:
            shutil.rmtree(cache)
            return from_store()

        # warm follows cold and uses its cache
        work: dict[str, Callable[[], dict[str, float]]] = {"local": from_disk, "cold": cold, "warm": from_store}
        measured = interleave(work, options.rounds)
    network = len(local) * options.bandwidth * 1e6 / num_bytes
    return print_rows(measured, network, num_bytes)


def read_epoch(place: Path | str, batch_size: int, proxy: ThrottledProxy, cache: CacheSettings) -> dict[str, float]:
    """Read one epoch, including the time to open the data set."""
    before, started = len(proxy.requests), time.perf_counter()
    dataset = build_multicrop_dataset("custom", place, num_global_crops=1, num_local_crops=0, global_crop_size=64).cached(cache)
    loader = build_multicrop_dataloader(dataset, batch_size, device="cpu", normalized=False, drop_last=False)
    images = sum(len(batch.labels) for batch in loader)
    seconds = time.perf_counter() - started
    loader.close()
    return {
        "images_per_s": images / seconds,
        "requests": len(proxy.requests) - before,
        "shard_requests": sum(".tar" in request for request in proxy.requests[before:]),
        "store_wait_percent": 100 * loader.store_wait_s / seconds,
    }


def print_rows(measured: dict[str, list[dict[str, float]]], network: float, num_bytes: int) -> list[dict[str, Any]]:
    """Print medians over the rounds and the verdict of each target, and return the rows of the JSON."""
    medians = {
        name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }
    cells = ([name, *(f"{value:,.1f}" for value in row.values())] for name, row in medians.items())
    print(table(("row", "images/s", "requests", "of shards", "% waiting for the store"), cells))
    print(f"network: {network:,.1f} images/s")
    rates = {name: [figures["images_per_s"] for figures in rounds] for name, rounds in measured.items()}
    slower, cold = [min(network, rate) for rate in rates["local"]], medians["cold"]
    print(target("images_per_s warm / local", median_ratio(rates["warm"], rates["local"]), ">=", MIN_WARM))
    print(target("images_per_s cold / slower of network and local", median_ratio(rates["cold"], slower), ">=", MIN_COLD))
    per_64_mb = cold["shard_requests"] / (num_bytes / BYTES_PER_REQUEST)
    print(target("requests for each 64 MB of shards, cold", per_64_mb, "<=", 1.0))
    return [{"name": name, **figures} for name, figures in medians.items()]
