"""Images per second and CPU time per image of the data pipeline, against torchvision and DALI's own operators.

All loaders make the default 2 x 224 + 6 x 96 crops of the same shards with the same recipe, on the same number of worker
threads (DALI) or worker processes (torch), as normalised float32 tensors. `dali-operators` is our graph with a chain of DALI's
operators for each crop; `decode-only` only reads and decodes.

CPU time is the user and system time of a loader's process, its threads and its live workers, over the batches in the middle
of a stream, without start-up and shutdown. Each loader has a process to itself, and only one works at a time.
"""

import argparse
import statistics
from collections.abc import Callable
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
        work = {name: (LOADERS[name], setup, options.images) for name in names}
        samples, count = open_index(folder).samples, full_batches(options.images, setup) * setup.batch_size
        print(
            f"{len(samples):,} images, median {statistics.median(samples['size']) / 1e3:.0f} KB; {setup.threads} threads, "
            f"batches of {setup.batch_size}, {count} images per row in each of {options.rounds} rounds",
            flush=True,
        )
        measured = measure_loaders(work, options.rounds)
    rows = [{"name": name, **summarize(rounds, measured.get("ours"))} for name, rounds in measured.items()]
    cells = (
        ["" if cell is None else f"{cell:,.2f}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows
    )
    print(table(["row", "images/s", "CPU ms/image", "cores busy", "CPU to ours"], cells))
    return rows


def measure_loaders(work: dict[str, tuple[Loader, LoaderSetup, int]], rounds: int) -> dict[str, list[Seconds]]:
    """Return `seconds_per_image` of each loader in every round. Raises ValueError with the name of a loader that fails."""

    def measured(name: str, submit: Callable[..., Any]) -> Seconds:
        try:
            return submit(seconds_per_image, *work[name]).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{name}: {error_line(error)}") from None

    with ExitStack() as stack:
        workers = {name: stack.enter_context(isolated_executor(__name__)) for name in work}
        return interleave({name: partial(measured, name, worker.submit) for name, worker in workers.items()}, rounds)


def summarize(rounds: list[Seconds], ours: list[Seconds] | None) -> dict[str, float | None]:
    """Return medians over the rounds. The ratio to `ours` is the median of those within a round."""
    ratios = [cpu / reference for (_, cpu), (_, reference) in zip(rounds, ours or (), strict=False)]
    return {
        "images_per_s": round(statistics.median(1 / wall for wall, _ in rounds), 3),
        "cpu_ms_per_image": round(1e3 * statistics.median(cpu for _, cpu in rounds), 3),
        "cores_busy": round(statistics.median(cpu / wall for wall, cpu in rounds), 3),
        "cpu_to_ours": round(statistics.median(ratios), 3) if ratios else None,
    }
