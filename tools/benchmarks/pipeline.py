"""Images per second and CPU time per image of the data pipeline, against torchvision and a hand-written DALI pipeline.

All loaders make the default 2 x 224 + 6 x 96 crops of the same shards with the same recipe, on the same number of worker
threads (DALI) or worker processes (torch), as normalised float32 tensors; `decode-only` only reads and decodes.

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
from tools.benchmarks.loaders import dali_native, decode_only, ours, torchvision_pil, torchvision_v2
from tools.benchmarks.measure import (
    Loader,
    LoaderSetup,
    choose,
    error_line,
    full_batches,
    interleave,
    median_ratio,
    seconds_per_image,
    table,
    target,
)
from tools.benchmarks.photographs import benchmark_shards
from tools.own_process import isolated_executor

LOADERS: dict[str, Loader] = {
    "ours": ours,
    "torchvision-pil": torchvision_pil,
    "torchvision-v2": torchvision_v2,
    "dali-native": dali_native,
    "decode-only": decode_only,
}
NUM_PHOTOGRAPHS = 256
CPU_TARGETS = {"torchvision-pil": 3.0, "torchvision-v2": 3.0, "dali-native": 0.95}  # minimum CPU time over ours


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
        return print_rows(measure_loaders(work, options.rounds))


def measure_loaders(work: dict[str, tuple[Loader, LoaderSetup, int]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return `seconds_per_image` of each loader in every round. Raises ValueError with the name of a loader that fails."""

    def measured(name: str, submit: Callable[..., Any]) -> tuple[float, float]:
        try:
            return submit(seconds_per_image, *work[name]).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{name}: {error_line(error)}") from None

    with ExitStack() as stack:
        workers = {name: stack.enter_context(isolated_executor(__name__)) for name in work}
        return interleave({name: partial(measured, name, worker.submit) for name, worker in workers.items()}, rounds)


def cpu_ratio(measured: dict[str, list[tuple[float, float]]], name: str) -> float | None:
    """Return the median ratio of a row's CPU time to ours; None if one of them was not measured."""
    if name not in measured or "ours" not in measured:
        return None
    return median_ratio(*([cpu for _, cpu in measured[row]] for row in (name, "ours")))


def print_rows(measured: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Print medians over the rounds and the verdict of each target, and return the rows of the JSON."""
    rows: list[dict[str, Any]] = []
    for name, rounds in measured.items():
        figures = {
            "images_per_s": statistics.median(1 / wall for wall, _ in rounds),
            "cpu_ms_per_image": 1e3 * statistics.median(cpu for _, cpu in rounds),
            "cores_busy": statistics.median(cpu / wall for wall, cpu in rounds),
            "cpu_to_ours": cpu_ratio(measured, name),
        }
        rows.append({"name": name, **{key: value and round(value, 3) for key, value in figures.items()}})
    cells = ([row["name"], *("" if row[key] is None else f"{row[key]:,.2f}" for key in figures)] for row in rows)
    print(table(["row", "images/s", "CPU ms/image", "cores busy", "CPU to ours"], cells))
    for name, minimum in CPU_TARGETS.items():
        if (value := cpu_ratio(measured, name)) is not None:
            print(target(f"cpu_ms_per_image {name} / ours", value, ">=", minimum))
    return rows
