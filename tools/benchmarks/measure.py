"""Shared measuring code of the benchmarks: interleaved rounds, medians, CPU time, peak memory, and the printed tables."""

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.dataset import resolve_device

os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # silences the profiler's own log lines
T = TypeVar("T")


@dataclass(frozen=True)
class LoaderSetup:
    """The settings that all loaders of a comparison share. `threads`: worker threads or processes. `device`: `cpu` or `gpu`."""

    folder: Path
    batch_size: int
    threads: int
    device: str = "cpu"


# An endless stream of batches: sequences whose first element has one entry per image.
Loader = Callable[[LoaderSetup], Iterator[Sequence[Any]]]
Step = Callable[[], object]


def interleave(measurements: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return each measurement's result in every round, whose results compare: a slow spell of the machine hits all alike."""
    results: dict[str, list[T]] = {name: [] for name in measurements}
    names = deque(measurements)
    for _ in range(rounds):
        for name in names:
            results[name].append(measurements[name]())
        names.rotate(-1)
    return results


def median_times(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each step."""

    def seconds(step: Step) -> float:
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        return time.perf_counter() - started

    times = interleave({name: partial(seconds, step) for name, step in steps.items()}, rounds + 1)
    return {name: statistics.median(each[1:]) for name, each in times.items()}  # a first call allocates and compiles


def torch_device(option: str) -> torch.device:
    """Return the device of `--device`. Raises ValueError for a GPU that is not there."""
    if option == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; write cpu or auto")
    return torch.device("cuda" if resolve_device(option) == "gpu" else "cpu")


def synchronize(device: torch.device | str) -> None:
    """Wait for the GPU; does nothing on the CPU. `device` is a torch device, or `cpu` or `gpu`."""
    if str(device).startswith(("cuda", "gpu")):
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Return the user and system time of this process, all its threads, and its live child processes."""
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)]
    # ~pid << 3 | 2 is the clock that clock_getcpuclockid(3) returns. It is exact; /proc counts ticks of 10 ms.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def choose(option: str, text: str | None, known: Collection[str]) -> list[str]:
    """Return the names in `a,b`, in the order of `known`; all of them without a text. Raises ValueError for an unknown one."""
    names = text.split(",") if text else known
    if unknown := set(names) - set(known):
        raise ValueError(f"{option}: unknown name {min(unknown)!r}, allowed are {', '.join(known)}")
    return [name for name in known if name in names]


def full_batches(images: int, setup: LoaderSetup) -> int:
    """Return the number of batches that hold at least `images`, the same number for every worker."""
    return -(-images // (setup.batch_size * setup.threads)) * setup.threads


def seconds_per_image(loader: Loader, setup: LoaderSetup, images: int, limit_s: float = math.inf) -> tuple[float, float]:
    """Return wall and CPU seconds per image in the middle of a loader's stream: over `images` of them, or for `limit_s`.

    The clocks start after as many batches as fill every worker's queue, and the stream does not end with them: the same
    number of batches is prefetched at the end as at the start.
    """
    torch.set_num_threads(1)
    # Warm up: every worker starts with its first batch.
    stream = loader(setup)
    for _ in range(max(2, setup.threads)):
        next(stream)
    synchronize(setup.device)
    wall, cpu, count = time.perf_counter(), cpu_seconds(), 0
    for _ in range(full_batches(images, setup)):
        batch = next(stream)
        count += len(batch[0])
        if time.perf_counter() - wall > limit_s:
            break
    synchronize(setup.device)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    stream.close()  # type: ignore[attr-defined]  # a generator; closing it stops its workers
    del stream, batch
    gc.collect()
    return wall / count, cpu / count


def error_line(error: BaseException) -> str:
    """Return the first line that says what is wrong: DALI puts pages of trace before it."""
    return (str(error).split("encountered:")[-1].strip() or repr(error)).splitlines()[0]


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return the peak of the bytes that torch allocates during a step, above those allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # The profiler records every allocation as a positive and every release as a negative change.
    changes = (event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(changes, initial=0))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Return an aligned Markdown table: the first `left` columns flush left, the others flush right."""
    columns = []
    for i, column in enumerate(zip(head, *rows, strict=True)):
        cells, end = [str(cell) for cell in column], "-" if i < left else ":"
        width = max(map(len, cells))
        cells = [f" {cell:{'<' if i < left else '>'}{width}} " for cell in cells]
        columns.append([cells[0], "-" * (width + 1) + end, *cells[1:]])
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*columns, strict=True))
