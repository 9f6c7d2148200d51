"""How the benchmarks measure: streams of batches in processes that take turns, and single calls on a CPU or a GPU."""

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tools.own_process import own_process

os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # or the profiler writes lines of its own between ours


@dataclass(frozen=True)
class Setup:
    """What all rows share. `threads`: worker threads or processes. `device`: `cpu` or `gpu`."""

    folder: Path
    batch_size: int
    threads: int
    device: str = "cpu"


# Endless batches: sequences whose first element has one entry per image.
Row = Callable[[Setup], Iterator[Sequence[Any]]]
Step = Callable[[], object]


def cpu_seconds() -> float:
    """User and system time of this process, all its threads, and its live workers."""
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)]
    # ~pid << 3 | 2 is the clock that clock_getcpuclockid(3) returns: exact, where /proc counts ticks of 10 ms.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def whole_batches(images: int, setup: Setup) -> int:
    """Batches that hold at least `images`, as many for every worker."""
    rounds = -(-images // (setup.batch_size * setup.threads))
    return rounds * setup.threads


def seconds_per_image(row: Row, setup: Setup, images: int, seconds: float = math.inf) -> tuple[float, float]:
    """Wall and CPU seconds per image in the middle of a row's stream: over `images` of them, or for `seconds`.

    The clocks start after as many batches as fill every worker's queue, and the stream does not end with them: every row has
    as much prepared at the end as at the start.
    """
    torch.set_num_threads(1)
    stream = row(setup)
    for _ in range(max(2, setup.threads)):
        next(stream)
    _wait_for_gpu(setup)
    wall, cpu, count = time.perf_counter(), cpu_seconds(), 0
    for _ in range(whole_batches(images, setup)):
        batch = next(stream)
        count += len(batch[0])
        if time.perf_counter() - wall > seconds:
            break
    _wait_for_gpu(setup)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    stream.close()  # type: ignore[attr-defined]  # a generator: stops its workers, so that it costs the others nothing
    del stream, batch
    gc.collect()
    return wall / count, cpu / count


def _wait_for_gpu(setup: Setup) -> None:
    if setup.device == "gpu":
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """One line: DALI puts pages of trace before what was wrong."""
    lines = str(error).split("encountered:")[-1].strip().splitlines()
    return lines[0] if lines else repr(error)


def interleave(rows: Mapping[str, tuple[Row, Setup, int]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For each row (with its setup and images) its `seconds_per_image` of every round; each round begins with another row.

    Raises ValueError with the name of a row that fails, and the reason.
    """
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    names = list(rows)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(own_process("tools.benchmarks.pipeline")) for name in names}
        for turn in (k % len(names) for k in range(rounds)):
            for name in names[turn:] + names[:turn]:
                try:
                    results[name].append(workers[name].submit(seconds_per_image, *rows[name]).result())
                except (ValueError, OSError, RuntimeError) as error:
                    raise ValueError(f"{name}: {reason(error)}") from None
    return results


def median_times(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds by name: medians over `repeats` rounds in which every step is taken once, after one that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # the first one allocates, and compiles
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def count(step: Step, device: torch.device) -> dict[str, int]:
    """FLOPs (attention included), calls, and the most bytes allocated above what was there before.

    Calls are kernels and copies on a GPU, operators on a CPU. What was compiled hides its FLOPs and, on a CPU, its calls.
    """
    flops = FlopCounterMode(display=False)
    with flops:
        step()
    calls = _calls_on_gpu(step) if device.type == "cuda" else _calls_on_cpu(step)
    return {"flops": flops.get_total_flops(), "peak_bytes": peak_bytes(step, device), "calls": calls}


def _calls_on_gpu(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _calls_on_cpu(step: Step) -> int:
    with _CallCounter() as counter:
        step()
    return counter.calls


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that torch holds during a step, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = (event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(changes, initial=0))


class _CallCounter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))
