"""Images per second and CPU time per image of the data pipeline, against torchvision and DALI's own operators.

All loaders make the default 2 x 224 + 6 x 96 crops of the same shards with the same recipe, on the same number of worker
threads (DALI) or worker processes (torch), as normalised float32 tensors. `dali-operators` is our graph with a chain of DALI's
operators for each crop; `decode-only` only reads and decodes.

CPU time is the user and system time of a loader's process, its threads and its live workers, over the batches in the middle
of a stream, without start-up and shutdown. Each loader has a process to itself, and only one works at a time.
"""

import argparse
import statistics
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from typing import Any

from pipeline.shards.index import open_index
from tools.benchmarks.loaders import decode_only, ours, torchvision
from tools.benchmarks.measure import Loader, LoaderSetup, choose, error_line, full_batches, interleave, seconds_per_image, table
from tools.benchmarks.photographs import benchmark_shards
from tools.own_process import isolated_executor

LOADERS: dict[str, Loader] = {
    "ours": ours,
    "torchvision": torchvision,
    "dali-operators": partial(ours, crop_device="dali"),
    "decode-only": decode_only,
}
NUM_PHOTOGRAPHS = 256
Seconds = tuple[float, float]
"""Wall and CPU seconds per image."""


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = choose("--rows", options.rows, LOADERS)
    with benchmark_shards(options.shards, max(NUM_PHOTOGRAPHS, options.batch), options.threads) as folder:
        setup = LoaderSetup(folder, options.batch, options.threads)
        samples, count = open_index(folder).samples, full_batches(options.images, setup) * setup.batch_size
        print(
            f"{len(samples):,} images, median {statistics.median(samples['size']) / 1e3:.0f} KB; {setup.threads} threads, "
            f"batches of {setup.batch_size}, {count} images per row in each of {options.rounds} rounds",
            flush=True,
        )
        with ExitStack() as stack:
            workers = {name: stack.enter_context(isolated_executor(__name__)) for name in names}
            measured = interleave(
                {name: partial(measure, name, worker, setup, options.images) for name, worker in workers.items()}, options.rounds
            )
    rows = [{"name": name, **summarize(rounds, measured.get("ours"))} for name, rounds in measured.items()]
    cells = ([row["name"], *("" if each is None else f"{each:,.2f}" for each in list(row.values())[1:])] for row in rows)
    print(table(["row", "images/s", "CPU ms/image", "cores busy", "CPU to ours"], cells))
    return rows


def measure(name: str, worker: Executor, setup: LoaderSetup, images: int) -> Seconds:
    """Return `seconds_per_image` of a loader in a subprocess. Raises ValueError with the name of one that fails."""
    try:
        return worker.submit(seconds_per_image, LOADERS[name], setup, images).result()
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{name}: {error_line(error)}") from None


def summarize(rounds: list[Seconds], ours: list[Seconds] | None) -> dict[str, float | None]:
    """Return medians over the rounds. The ratio to `ours` is the median of those within a round."""
    figures = {
        "images_per_s": [1 / wall for wall, _ in rounds],
        "cpu_ms_per_image": [1e3 * cpu for _, cpu in rounds],
        "cores_busy": [cpu / wall for wall, cpu in rounds],
        "cpu_to_ours": [cpu / reference for (_, cpu), (_, reference) in zip(rounds, ours or (), strict=False)],
    }
    return {name: round(statistics.median(values), 3) if values else None for name, values in figures.items()}
