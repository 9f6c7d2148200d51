"""What it costs to go from one window of the data set to the next, in wall time and in CPU time.

A data set larger than 50,000 samples is read by one DALI graph after another, the next one built in the background; the end
of an epoch is no special case. The same stream is measured in one window and in many small ones, in rounds that take turns.
"""

import argparse
import os
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import window
from tools.benchmarks.dali import ours
from tools.benchmarks.measure import Row, Setup, interleave
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.tables import target

NUM_PHOTOGRAPHS = 256
FULL_WINDOW = window.WINDOW_ROWS
LIMIT = 0.02  # of an epoch


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--shards", type=Path, metavar="DIR", help="Read these shards. By default photographs of about 100 KB are made."
    )
    add("--rows", type=int, default=512, help="The samples of a small window. The default is %(default)s.")
    add("--images", type=int, default=2048, help="The images of a round. The default is %(default)s.")
    add("--rounds", type=int, default=5, help="How often each is measured. The default is %(default)s.")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="The default is %(default)s.")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    if given.images < given.rows:
        raise ValueError(f"--images: {given.images}, must be at least a window of {given.rows}")
    threads = len(os.sched_getaffinity(0))
    with benchmark_shards(given.shards, NUM_PHOTOGRAPHS, threads) as folder:
        setup = Setup(folder, 32, threads, given.device)
        sizes = {"one window": FULL_WINDOW, "small windows": given.rows}
        work: dict[str, tuple[Row, Setup, int]] = {
            name: (partial(in_windows, size), setup, given.images) for name, size in sizes.items()
        }
        measured = interleave(work, given.rounds)
    return [summarise(kind, measured, place, given.rows) for place, kind in enumerate(("wall", "CPU"))]


def in_windows(rows: int, setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    window.WINDOW_ROWS = rows  # in this row's own process
    yield from ours(setup)


def cost(whole: Sequence[float], cut: Sequence[float], window_rows: int) -> tuple[float, float]:
    """Seconds of a change, and their share of an epoch of full windows, from seconds per image of either stream."""
    seconds = statistics.median(b - a for a, b in zip(whole, cut, strict=True)) * window_rows
    return seconds, seconds / (statistics.median(whole) * FULL_WINDOW)


def summarise(
    kind: str, measured: dict[str, list[tuple[float, float]]], place: int, window_rows: int
) -> dict[str, Any]:
    """One row of the JSON: seconds from one window to the next, and their share of an epoch of full windows."""
    whole, cut = ([figures[place] for figures in measured[name]] for name in ("one window", "small windows"))
    seconds, share = cost(whole, cut, window_rows)
    print(
        f"{kind:4}: {1e3 * statistics.median(whole):.2f} ms per image, {1e3 * seconds:,.0f} ms from one window to the next; "
        + target(f"share of an epoch in windows of {FULL_WINDOW:,}", share, "<=", LIMIT)
    )
    return {"name": f"windows-{kind}", "seconds_per_window": seconds, "share_of_epoch": share}
