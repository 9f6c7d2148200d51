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
from pathlib import Path
from typing import Any

from pipeline.shards.index import open_index
from tools.benchmarks.loaders import dali_native, decode_only, ours, torchvision_pil, torchvision_v2
from tools.benchmarks.measure import (
    Loader,
    LoaderSetup,
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
NUM_CROPS = 8
CPU_TARGETS = {"torchvision-pil": 3.0, "torchvision-v2": 3.0, "dali-native": 0.95}  # minimum CPU time over ours


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = chosen_rows(options.rows)
    with benchmark_shards(options.shards, max(NUM_PHOTOGRAPHS, options.batch), options.threads) as folder:
        setup = LoaderSetup(folder, options.batch, options.threads)
        work = {name: (LOADERS[name], setup, options.images) for name in names}
        print(describe(folder, setup, options), flush=True)
        measured = measure_loaders(work, options.rounds)
    rows = [summarise(name, measured) for name in work]
    print_rows(rows, measured)
    return rows


def chosen_rows(text: str | None) -> list[str]:
    """Return the CPU rows to measure. Raises ValueError for an unknown name."""
    names = text.split(",") if text else list(LOADERS)
    for name in names:
        if name not in LOADERS:
            raise ValueError(f"--rows: unknown row {name!r}, allowed are {', '.join(LOADERS)}")
    return [name for name in LOADERS if name in names]


def measure_loaders(
    work: dict[str, tuple[Loader, LoaderSetup, int]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return `seconds_per_image` of each loader in every round. Raises ValueError with the name of a loader that fails."""

    def measured(name: str, submit: Callable[..., Any]) -> tuple[float, float]:
        try:
            return submit(seconds_per_image, *work[name]).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{name}: {error_line(error)}") from None

    with ExitStack() as stack:
        workers = {name: stack.enter_context(isolated_executor(__name__)) for name in work}
        return interleave({name: partial(measured, name, worker.submit) for name, worker in workers.items()}, rounds)


def summarise(name: str, measured: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return one row of the JSON: medians over the rounds. `cores_busy` is CPU time over wall time."""
    images_per_s = statistics.median(1 / wall for wall, _ in measured[name])
    to_ours = cpu_ratio(measured, name, "ours")
    return {
        "name": name,
        "images_per_s": round(images_per_s, 1),
        "crops_per_s": None if name == "decode-only" else round(images_per_s * NUM_CROPS, 1),
        "cpu_ms_per_image": round(1e3 * statistics.median(cpu for _, cpu in measured[name]), 3),
        "cores_busy": round(statistics.median(cpu / wall for wall, cpu in measured[name]), 2),
        "cpu_to_ours": None if to_ours is None else round(to_ours, 3),
        "rounds_cpu_ms": [round(1e3 * cpu, 3) for _, cpu in measured[name]],
    }


def cpu_ratio(measured: dict[str, list[tuple[float, float]]], name: str, other: str) -> float | None:
    """Return the median ratio of two rows' CPU time; None if one of them was not measured."""
    if name not in measured or other not in measured:
        return None
    return median_ratio(*([cpu for _, cpu in measured[key]] for key in (name, other)))


def print_rows(rows: list[dict[str, Any]], measured: dict[str, list[tuple[float, float]]]) -> None:
    columns = {
        "row": ("name", ""), "images/s": ("images_per_s", ",.1f"), "crops/s": ("crops_per_s", ",.0f"),
        "CPU ms/image": ("cpu_ms_per_image", ".2f"), "cores busy": ("cores_busy", ".2f"), "CPU to ours": ("cpu_to_ours", ".2f"),
    }  # fmt: skip
    cells = ([format(row[key], form) if row[key] is not None else "" for key, form in columns.values()] for row in rows)
    print(table(list(columns), cells))
    for name, minimum in CPU_TARGETS.items():
        if (value := cpu_ratio(measured, name, "ours")) is not None:
            print(target(f"cpu_ms_per_image {name} / ours", value, ">=", minimum))


def describe(folder: Path, setup: LoaderSetup, options: argparse.Namespace) -> str:
    samples = open_index(folder).samples
    size = f"{statistics.median(samples['width']):.0f}x{statistics.median(samples['height']):.0f}"
    count = full_batches(options.images, setup) * setup.batch_size
    return (
        f"{len(samples):,} images, median {size} and {statistics.median(samples['size']) / 1e3:.0f} KB; "
        f"{setup.threads} threads, batches of {setup.batch_size}, {count} images per row in each of {options.rounds} rounds"
    )
