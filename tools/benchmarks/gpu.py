"""Everything that only a GPU can tell, as one table for the README; `--device cpu` rehearses it with small sizes.

Each measurement runs in a subprocess, within the time that it needs. One that fails or takes too long gets a row with the
reason and does not stop the others. Needs no network.
"""

import argparse
import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import nvidia.dali
import torch

from tools.benchmarks.gpu_parts import PARTS, Figures, GpuCase, Measurement, plan
from tools.benchmarks.measure import choose, error_line, table, torch_device
from tools.benchmarks.photographs import benchmark_shards
from tools.checks.machine import driver_version
from tools.own_process import isolated_executor
from train.command import write_json

NUM_PHOTOGRAPHS, NUM_REHEARSED = 256, 48
MEASURED_S, REHEARSED_S, PATIENCE_S = 6.0, 1.0, 600.0  # a rehearsal is slow, but never stopped
MINUTES, MINUTES_OF_PARTS = 8.0, 3.0


@dataclass(frozen=True)
class Result:
    """One row of the table: figures by unit, or the reason why there are none."""

    name: str
    figures: Figures = field(default_factory=dict)
    error: str = ""
    part: str = ""

    @property
    def text(self) -> str:
        figures = (f"{value:{',.0f' if value >= 100 else '.3g'}} {unit}" for unit, value in self.figures.items())
        return f"FAILED: {self.error}" if self.error else ", ".join(figures)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    device = "gpu" if torch_device(options.device).type == "cuda" else "cpu"
    parts, started = choose("--parts", options.parts, PARTS), options.started
    limit_s = 60 * (options.minutes or (MINUTES_OF_PARTS if options.parts else MINUTES))
    results, cores = list[Result](), f"{len(os.sched_getaffinity(0))} CPU cores"
    if device == "gpu":
        gpu = torch.cuda.get_device_properties(0)
        machine = f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB, driver {driver_version()}, {cores}"
    else:
        machine = f"{cores}, a rehearsal"
    where = f"{machine}, torch {torch.__version__}, DALI {nvidia.dali.__version__}, {time.strftime('%Y-%m-%d')}"
    planned, counts = [each for each in plan(device) if each[0] in parts], Counter(part for part, *_ in plan("gpu"))
    needs = ", ".join(f"{part} {counts[part] * PARTS[part]}" for part in parts)
    print(f"on a GPU, within {limit_s:.0f} s, each part needs so many: {needs}", flush=True)
    with benchmark_shards(options.shards, NUM_REHEARSED if device == "cpu" else NUM_PHOTOGRAPHS, options.threads) as folder:
        case = GpuCase(folder, device, options.threads, REHEARSED_S if device == "cpu" else MEASURED_S)
        for number, (part, name, measure) in enumerate(planned):
            left_s = limit_s - (time.monotonic() - started) - sum(PARTS[later] for later, *_ in planned[number + 1 :])
            rows = run_limited(name, measure, case, PATIENCE_S if case.rehearsal else max(left_s, PARTS[part]))
            for result in rows:
                results.append(replace(result, part=part))
                print(f"[{time.monotonic() - started:4.0f} s] {part}: {result.name}: {result.text}", flush=True)
            figures = {"where": where, "device": device, "lines": [asdict(result) for result in results]}
            if options.json not in (None, "-"):  # at once: the results stay if a later measurement takes the machine down
                write_json(options.json, figures)
    print(f"\n{where}; `python tools/bench.py gpu`\n")
    print(table(["part", "", "figures"], ((result.part, result.name, result.text) for result in results), left=3))
    return figures


def run_limited(name: str, measure: Measurement, case: GpuCase, limit_s: float) -> list[Result]:
    """Return the results of a measurement, or one row with the reason why there are none, after at most `limit_s`."""
    # A process rather than a thread: a measurement can hang or crash in CUDA, and only the kernel can end it then.
    with isolated_executor(__name__, "pipeline.crops.cpu_operator") as worker:
        worker.submit(torch.set_num_threads, max(1, case.threads // 2) if case.rehearsal else 1)
        try:
            return [Result(*row) for row in worker.submit(measure, case).result(limit_s).items()]
        except TimeoutError:
            return [Result(name, error=f"stopped after {limit_s:.0f} s")]
        except BrokenProcessPool:
            return [Result(name, error="its process ended: killed, or crashed")]
        except Exception as error:  # noqa: BLE001  # a bug becomes a row: it must not stop the other measurements
            return [Result(name, error=f"{type(error).__name__}: {error_line(error)}"[:200])]
        finally:
            for process in multiprocessing.active_children():
                process.kill()
