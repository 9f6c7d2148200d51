"""Images per second and CPU time per image of the data pipeline, beside torchvision, lightly-train and plain DALI.

All rows make the default 2 x 224 + 6 x 96 crops of the same shards with the same recipe, on as many worker threads (DALI)
or worker processes (torch), and hand over batches of normalised float32 tensors; `decode-only` reads and decodes.

Counted per image is the user and system time of a row's process, its threads and its live workers, over the batches in the
middle of a stream: start-up, the first batches and the shutdown are left out for every row alike. Each row has a process to
itself and only one works at a time. The rows take turns, in another order each round; figures are medians over the rounds,
and ratios are medians of the ratios within a round, which a slow spell of the machine does not move.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from pipeline.dataset import resolve_device
from pipeline.shards.index import open_index
from tools.benchmarks.dali import dali_native, decode_only, ours
from tools.benchmarks.measure import Row, Setup, interleave, whole_batches
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.tables import table, target
from tools.benchmarks.torch import lightly_train, lightly_train_installed, torchvision_pil, torchvision_v2

ROWS: dict[str, Row] = {
    "ours": ours,
    "torchvision-pil": torchvision_pil,
    "torchvision-v2": torchvision_v2,
    "lightly-train": lightly_train,
    "dali-native": dali_native,
    "decode-only": decode_only,
}
GPU_ROWS: dict[str, Row] = {"ours-gpu": ours, "decode-only-gpu": decode_only}
NUM_PHOTOGRAPHS = 256
GPU_FACTOR, GPU_BATCHES = 40, 4  # more images and larger batches on the GPU, which is done with the others' in a blink
CROPS = 8
# row, what it is compared with, the key whose ratio counts, least ratio
TARGETS = (
    ("torchvision-pil", "ours", "cpu_ms_per_image", 3.0),
    ("torchvision-v2", "ours", "cpu_ms_per_image", 3.0),
    ("dali-native", "ours", "cpu_ms_per_image", 0.95),
    ("ours-gpu", "decode-only-gpu", "images_per_s", 0.9),
)
GPU_IMAGES_PER_S = 5000


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--shards", type=Path, metavar="DIR", help="Read these shards. By default photographs of about 100 KB are made."
    )
    add("--images", type=int, default=256, help="The images of each row and round. The default is %(default)s.")
    add("--rounds", type=int, default=5, help="How often each row is measured. The default is %(default)s.")
    add("--rows", help=f"Some of {', '.join(ROWS)}, separated by commas. The default is all.")
    add(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="Threads or processes. The default is one per core.",
    )
    add("--batch", type=int, default=32, help="The images of a batch. The default is %(default)s.")
    add(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="With gpu, rows for the device are added. The default is %(default)s.",
    )


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    names = chosen_rows(given.rows)
    num_photographs = max(NUM_PHOTOGRAPHS, GPU_BATCHES * given.batch)
    with benchmark_shards(given.shards, num_photographs, given.threads) as folder:
        setup = Setup(folder, given.batch, given.threads)
        work = {name: (ROWS[name], setup, given.images) for name in names}
        if resolve_device(given.device) == "gpu":
            on_gpu = Setup(folder, GPU_BATCHES * given.batch, given.threads, "gpu")
            work |= {name: (row, on_gpu, GPU_FACTOR * given.images) for name, row in GPU_ROWS.items()}
        print(_describe(folder, setup, given), flush=True)
        measured = interleave(work, given.rounds)
    rows = [summarise(name, measured) for name in work]
    print_rows(rows)
    print_targets({row["name"]: row for row in rows}, measured)
    return rows


def chosen_rows(given: str | None) -> list[str]:
    """The rows to measure, without lightly-train where it is not installed. Raises ValueError for an unknown name."""
    names = given.split(",") if given else list(ROWS)
    for name in names:
        if name not in ROWS:
            raise ValueError(f"--rows: unknown row {name!r}, allowed are {', '.join(ROWS)}")
    if "lightly-train" in names and not lightly_train_installed():
        print("lightly-train: skipped, not installed (pip install lightly-train, in an environment of its own)")
        names = [name for name in names if name != "lightly-train"]
    return [name for name in ROWS if name in names]


def summarise(name: str, measured: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """One row of the JSON: medians over the rounds. `cores_busy` is CPU time over wall time."""
    images_per_s = statistics.median(1 / wall for wall, _ in measured[name])
    to_ours = ratio(measured, name, "ours", "cpu_ms_per_image")
    return {
        "name": name,
        "images_per_s": round(images_per_s, 1),
        "crops_per_s": None if name.startswith("decode-only") else round(images_per_s * CROPS, 1),
        "cpu_ms_per_image": round(1e3 * statistics.median(cpu for _, cpu in measured[name]), 3),
        "cores_busy": round(statistics.median(cpu / wall for wall, cpu in measured[name]), 2),
        "cpu_to_ours": None if to_ours is None else round(to_ours, 3),
        "rounds_cpu_ms": [round(1e3 * cpu, 3) for _, cpu in measured[name]],
    }


def ratio(measured: dict[str, list[tuple[float, float]]], name: str, other: str, key: str) -> float | None:
    """The median over the rounds of a row's figure over another's; None where one was not measured."""
    if name not in measured or other not in measured:
        return None
    pairs = zip(measured[name], measured[other], strict=True)
    if key == "cpu_ms_per_image":
        return statistics.median(cpu / other_cpu for (_, cpu), (_, other_cpu) in pairs)
    return statistics.median(other_wall / wall for (wall, _), (other_wall, _) in pairs)


def print_rows(rows: list[dict[str, Any]]) -> None:
    head = {
        "row": ("name", ""), "images/s": ("images_per_s", ",.1f"), "crops/s": ("crops_per_s", ",.0f"),
        "CPU ms/image": ("cpu_ms_per_image", ".2f"), "/ ours": ("cpu_to_ours", ".2f"), "cores busy": ("cores_busy", ".2f"),
    }  # fmt: skip
    print(table(list(head), ([_shown(row[key], style) for key, style in head.values()] for row in rows)))


def _shown(value: Any, style: str) -> str:
    return "" if value is None else format(value, style)


def print_targets(rows: dict[str, dict[str, Any]], measured: dict[str, list[tuple[float, float]]]) -> None:
    for name, other, key, least in TARGETS:
        value = ratio(measured, name, other, key)
        if value is not None:
            print(target(f"{key} {name} / {other}", value, ">=", least))
    if "ours-gpu" in rows:
        print(target("images_per_s ours-gpu", rows["ours-gpu"]["images_per_s"], ">=", GPU_IMAGES_PER_S))


def _describe(folder: Path, setup: Setup, given: argparse.Namespace) -> str:
    samples = open_index(folder).samples
    size = f"{statistics.median(samples['width']):.0f}x{statistics.median(samples['height']):.0f}"
    count = whole_batches(given.images, setup) * setup.batch_size
    return (
        f"{len(samples):,} images, median {size} and {statistics.median(samples['size']) / 1e3:.0f} KB; "
        f"{setup.threads} threads, batches of {setup.batch_size}, {count} images per row in each of {given.rounds} rounds"
    )
