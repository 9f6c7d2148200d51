"""What it costs to go from one window of the data set to the next, in wall time and in CPU time.

A data set larger than 50,000 samples is read by one DALI graph after another, the next one built in the background; an epoch's
end is nothing more. The same stream is measured in one window and in many small ones, in rounds that take turns.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import window
from pipeline.shards.index import split_folder
from tools.benchmarks.dali import ours
from tools.benchmarks.measure import Row, Setup, interleave
from tools.benchmarks.photographs import photograph_shards

NUM_PHOTOGRAPHS = 256
LIMIT = 0.02  # of an epoch


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shards", type=Path, metavar="DIR", help="default: photographs of about 100 KB, made for it")
    command.add_argument("--rows", type=int, default=512, help="samples in a small window; default: %(default)s")
    command.add_argument("--images", type=int, default=2048, help="per round; default: %(default)s")
    command.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    command.add_argument("--device", choices=("cpu", "gpu"), default="cpu")


def run(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    for name in ("rows", "images", "rounds"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name}: {getattr(parsed, name)}, must be at least 1")
    if parsed.images < parsed.rows:
        raise ValueError(f"--images: {parsed.images}, must be at least a window of {parsed.rows}")
    shared = Path("/dev/shm")
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as temporary:
        if parsed.shards:
            folder = split_folder("custom", parsed.shards, "train")
        else:
            folder = photograph_shards(Path(temporary), NUM_PHOTOGRAPHS, threads)
        setup = Setup(folder, 32, threads, parsed.device)
        sizes = {"one window": window.WINDOW_ROWS, "small windows": parsed.rows}
        work: dict[str, tuple[Row, Setup, int]] = {
            name: (partial(in_windows, size), setup, parsed.images) for name, size in sizes.items()
        }
        measured = interleave(work, parsed.rounds)
    return [summarise(kind, measured, place, parsed.rows) for place, kind in enumerate(("wall", "CPU"))]


def in_windows(rows: int, setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    window.WINDOW_ROWS = rows  # in this row's own process
    yield from ours(setup)


def summarise(
    kind: str, measured: dict[str, list[tuple[float, float]]], place: int, window_rows: int
) -> dict[str, Any]:
    """One row of the JSON: seconds from one window to the next, and their share of an epoch of full windows."""
    whole, cut = ([figures[place] for figures in measured[name]] for name in ("one window", "small windows"))
    cost = statistics.median(b - a for a, b in zip(whole, cut, strict=True)) * window_rows
    share = cost / (statistics.median(whole) * window.WINDOW_ROWS)
    verdict = "met" if share < LIMIT else "MISSED"
    print(
        f"{kind:4}: {1e3 * statistics.median(whole):.2f} ms per image, {1e3 * cost:,.0f} ms from a window to the next: "
        f"{share:.2%} of an epoch in windows of {window.WINDOW_ROWS:,}, wanted < {LIMIT:.0%}: {verdict}"
    )
    return {"name": f"windows-{kind}", "seconds_per_window": cost, "share_of_epoch": share}
