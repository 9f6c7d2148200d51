"""Images per second and CPU time per image of the data pipeline, beside torchvision, lightly-train and plain DALI.

All rows make the default 2 x 224 + 6 x 96 crops of the same shards with the same recipe, on as many worker threads (DALI)
or worker processes (torch), and hand over batches of normalised float32 tensors; `decode-only` reads and decodes.

Counted per image is the user and system time of a row's process, its threads and its live workers, over the batches in the
middle of a stream: start-up, the first batches and shutting down are left out of every row alike. Each row has a process to
itself and only one is at work at a time. The rows take turns, in another order each round; figures are medians over the
rounds, and ratios are medians of the ratios within a round, which a slow spell of the machine does not move.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pipeline.dataset import resolve_device
from pipeline.shards.index import split_folder
from tools.benchmarks.dali import dali_native, decode_only, ours
from tools.benchmarks.measure import Row, Setup, interleave, whole_batches
from tools.benchmarks.photographs import photograph_shards
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
    cores = len(os.sched_getaffinity(0))
    command.add_argument("--shards", type=Path, metavar="DIR", help="default: photographs of about 100 KB, made for it")
    command.add_argument("--images", type=int, default=256, help="measured per row and round; default: %(default)s")
    command.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    command.add_argument("--rows", help=f"comma-separated, of {', '.join(ROWS)}; default: all")
    command.add_argument("--threads", type=int, default=cores, help="worker threads or processes; default: the cores")
    command.add_argument("--batch", type=int, default=32, help="images in a batch; default: %(default)s")
    command.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="gpu adds rows for the device"
    )


def run(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    for name in ("images", "rounds", "threads", "batch"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name}: {getattr(parsed, name)}, must be at least 1")
    names = chosen_rows(parsed.rows)
    # In memory where there is room: what is measured is the making of crops, not the disk.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as temporary:
        if parsed.shards:
            folder = split_folder("custom", parsed.shards, "train")
        else:
            folder = photograph_shards(
                Path(temporary), max(NUM_PHOTOGRAPHS, GPU_BATCHES * parsed.batch), parsed.threads
            )
        setup = Setup(folder, parsed.batch, parsed.threads)
        work = {name: (ROWS[name], setup, parsed.images) for name in names}
        if resolve_device(parsed.device) == "gpu":
            on_gpu = Setup(folder, GPU_BATCHES * parsed.batch, parsed.threads, "gpu")
            work |= {name: (row, on_gpu, GPU_FACTOR * parsed.images) for name, row in GPU_ROWS.items()}
        print(_describe(folder, setup, parsed), flush=True)
        measured = interleave(work, parsed.rounds)
    rows = [summarise(name, measured) for name in work]
    print_table(rows)
    print_targets({row["name"]: row for row in rows}, measured)
    return rows


def chosen_rows(given: str | None) -> list[str]:
    """The rows to measure. Says when lightly-train is left out; raises ValueError for a name that is no row."""
    names = given.split(",") if given else list(ROWS)
    for name in names:
        if name not in ROWS:
            raise ValueError(f"--rows: {name!r} is no row, allowed are {', '.join(ROWS)}")
    if "lightly-train" in names and not lightly_train_installed():
        print("lightly-train: left out, it is not installed (pip install lightly-train, in an environment of its own)")
        names = [name for name in names if name != "lightly-train"]
    return [name for name in ROWS if name in names]


def summarise(name: str, measured: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """One row of the JSON: medians over the rounds. `cores_busy` is CPU time over wall time."""
    images_per_s = statistics.median(1 / wall for wall, _ in measured[name])
    has_crops = not name.startswith("decode-only")
    return {
        "name": name,
        "images_per_s": round(images_per_s, 1),
        "crops_per_s": round(images_per_s * CROPS, 1) if has_crops else None,
        "cpu_ms_per_image": round(1e3 * statistics.median(cpu for _, cpu in measured[name]), 3),
        "cores_busy": round(statistics.median(cpu / wall for wall, cpu in measured[name]), 2),
        "cpu_to_ours": _rounded(ratio(measured, name, "ours", "cpu_ms_per_image")),
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


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'row':16} {'images/s':>9} {'crops/s':>9} {'CPU ms/image':>13} {'/ ours':>7} {'cores busy':>11}")
    for row in rows:
        crops = "" if row["crops_per_s"] is None else f"{row['crops_per_s']:,.0f}"
        to_ours = "" if row["cpu_to_ours"] is None else f"{row['cpu_to_ours']:.2f}"
        print(
            f"{row['name']:16} {row['images_per_s']:9,.1f} {crops:>9} {row['cpu_ms_per_image']:13.2f} {to_ours:>7} "
            f"{row['cores_busy']:11.2f}"
        )


def print_targets(rows: dict[str, dict[str, Any]], measured: dict[str, list[tuple[float, float]]]) -> None:
    for name, other, key, least in TARGETS:
        value = ratio(measured, name, other, key)
        if value is not None:
            print(f"{key} {name} / {other}: {value:.2f}, wanted >= {least}: {_verdict(value >= least)}")
    if "ours-gpu" in rows:
        rate = rows["ours-gpu"]["images_per_s"]
        print(f"ours-gpu images/s: {rate:,.0f}, wanted >= {GPU_IMAGES_PER_S:,}: {_verdict(rate >= GPU_IMAGES_PER_S)}")


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _describe(folder: Path, setup: Setup, parsed: argparse.Namespace) -> str:
    from pipeline.shards.index import open_index

    samples = open_index(folder).samples
    size = f"{statistics.median(samples['width']):.0f}x{statistics.median(samples['height']):.0f}"
    count = whole_batches(parsed.images, setup) * setup.batch_size
    return (
        f"{len(samples):,} images, median {size} and {statistics.median(samples['size']) / 1e3:.0f} KB; "
        f"{setup.threads} threads, batches of {setup.batch_size}, {count} images per row in each of {parsed.rounds} rounds"
    )
