"""What one call of a function costs, on a CPU or on a GPU."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # or the profiler writes lines of its own between ours
Step = Callable[[], None]


def median_times(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
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
    measure = _count_on_gpu if device.type == "cuda" else _count_on_cpu
    return {"flops": flops.get_total_flops(), **measure(step)}


def _count_on_gpu(step: Step) -> dict[str, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    calls = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
    return {"peak_bytes": peak, "calls": calls}


def _count_on_cpu(step: Step) -> dict[str, int]:
    calls = _CallCounter()
    with calls:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return {"peak_bytes": peak, "calls": calls.calls}


class _CallCounter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))
