"""What the rows of `bench.py pipeline` are measured by: a process for each, its CPU clock, and rounds that take turns."""

import contextlib
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.shards.convert import die_with_parent


@dataclass(frozen=True)
class Setup:
    """What all rows share. `threads`: worker threads or processes. `device`: `cpu` or `gpu`."""

    folder: Path
    batch_size: int
    threads: int
    device: str = "cpu"


# Endless batches: sequences whose first element has one entry per image.
Row = Callable[[Setup], Iterator[Sequence[Any]]]


def cpu_seconds() -> float:
    """User and system time of this process, all its threads, and its live workers."""
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)]
    # ~pid << 3 | 2 is the clock that clock_getcpuclockid(3) returns: exact, where /proc counts ticks of 10 ms.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def whole_batches(images: int, setup: Setup) -> int:
    """Batches that hold at least `images`, as many for every worker."""
    rounds = -(-images // (setup.batch_size * setup.threads))
    return rounds * setup.threads


def measure(row: Row, setup: Setup, images: int) -> tuple[float, float]:
    """Wall and CPU seconds per image in the middle of a row's stream.

    The stream is opened, and as many batches pass as would fill every worker's queue; then the clocks run. It goes on after
    them, so that every row has made ahead as much at the end as at the start.
    """
    stream = row(setup)
    for _ in range(max(2, setup.threads)):
        next(stream)
    _wait_for_gpu(setup)
    wall, cpu, count = time.perf_counter(), cpu_seconds(), 0
    for _ in range(whole_batches(images, setup)):
        batch = next(stream)
        count += len(batch[0])
    _wait_for_gpu(setup)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    stream.close()  # type: ignore[attr-defined]  # a generator: stops its workers, so that it costs the others nothing
    del stream, batch
    gc.collect()
    return wall / count, cpu / count


def _wait_for_gpu(setup: Setup) -> None:
    if setup.device == "gpu":
        torch.cuda.synchronize()


class RowProcess:
    """A process of its own for one row, so that nobody's threads or allocator are measured with another's."""

    def __init__(self, name: str, row: Row, setup: Setup) -> None:
        self.name = name
        # A fork saves each row the imports, seconds of them; but CUDA does not outlive one.
        context = multiprocessing.get_context("spawn" if setup.device == "gpu" else "fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(row, setup, theirs))  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def measure(self, images: int) -> tuple[float, float]:
        """Wall and CPU seconds per image. Raises ValueError with the reason when the row fails."""
        try:
            self.connection.send(images)
            result = self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise ValueError(f"{self.name}: its process ended with exit code {self.process.exitcode}") from None
        if isinstance(result, str):
            raise ValueError(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # its process may have died
            self.connection.send(None)
        self.process.join()


def _serve(row: Row, setup: Setup, connection: Connection) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    while (images := connection.recv()) is not None:
        try:
            connection.send(measure(row, setup, images))
        except (ValueError, OSError, RuntimeError) as error:
            # DALI gives pages of trace before it says what was wrong.
            lines = str(error).split("encountered:")[-1].strip().splitlines() or [repr(error)]
            connection.send(lines[0])


def interleave(rows: Mapping[str, tuple[Row, Setup, int]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For each row (with its setup and images) its `measure` of every round; each round begins with another row."""
    processes: dict[str, RowProcess] = {}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    names = list(rows)
    try:
        for name, (row, setup, _) in rows.items():
            processes[name] = RowProcess(name, row, setup)
        for k in range(rounds):
            turn = k % len(names)
            for name in names[turn:] + names[:turn]:
                results[name].append(processes[name].measure(rows[name][2]))
    finally:
        for process in processes.values():
            process.close()
    return results
