"""What only a GPU can tell, as one table for the README; `--device cpu` rehearses it with small sizes.

Each part runs in a process of its own, within its share of `--minutes`. A part that fails or takes too long is reported in its
row and does not stop the others. Needs no network.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset import resolve_device
from tools.benchmarks.gpu_parts.part import PARTS, Case, Line, Measurement, attempt
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.tables import table
from tools.checks.gpu import driver_version
from tools.own_process import die_with_parent

# In the order of the table; what is needed first comes first.
MODULES = [f"tools.benchmarks.gpu_parts.{name}" for name in ("data", "model", "suite")]
for _module in MODULES:
    import_module(_module)
NUM_PHOTOGRAPHS, NUM_REHEARSED = 512, 48
CONTEXT = multiprocessing.get_context("forkserver")
MEASURED = 0.7  # of a part's time; the rest is for first batches and for building models
REHEARSED_S = 5.0  # measured in each part of a rehearsal, whatever the minutes


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--minutes", type=float, default=8.0, help="The time of all parts together. The default is %(default)s.")
    add(
        "--device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="With cpu it is a rehearsal. The default is %(default)s.",
    )
    add("--parts", help=f"Some of {', '.join(PARTS)}, separated by commas. The default is all.")
    add(
        "--shards", type=Path, metavar="DIR", help="Read these shards. By default photographs of about 100 KB are made."
    )
    add(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="The threads of DALI. The default is one per core.",
    )


def run(given: argparse.Namespace) -> dict[str, Any]:
    device, names = resolve_device(given.device), chosen(given.parts)
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; --device cpu rehearses without one")
    figures: dict[str, Any] = {**describe(device), "minutes": given.minutes, "lines": []}
    lines: list[Line] = []
    with benchmark_shards(given.shards, NUM_REHEARSED if device == "cpu" else NUM_PHOTOGRAPHS, given.threads) as folder:
        start_server()
        started = time.monotonic()
        end = started + 60 * given.minutes
        for number, name in enumerate(names):
            share = PARTS[name].weight / sum(PARTS[later].weight for later in names[number:])
            seconds = max(1.0, share * (end - time.monotonic()))
            for found in run_part(PARTS[name].measure, Case(folder, device, given.threads), seconds):
                line = replace(found, part=name)
                print(f"[{time.monotonic() - started:4.0f} s] {name}: {line.what}: {line.text}", flush=True)
                lines.append(line)
            figures["lines"] = [asdict(line) for line in lines]
            if given.json:  # at once: what was measured stays, should a later part take the machine down
                given.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{figures['where']}; `python tools/bench.py gpu`\n")
    print(table(["part", "", "figures"], ((line.part, line.what, line.text) for line in lines), left=3))
    return figures


def chosen(given: str | None) -> list[str]:
    names = [name.strip() for name in given.split(",")] if given else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise ValueError(f"--parts: unknown part {name!r}, allowed are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def describe(device: str) -> dict[str, Any]:
    import nvidia.dali

    cores = len(os.sched_getaffinity(0))
    place = f"{cores} CPU cores, a rehearsal"
    if device == "gpu":
        gpu = torch.cuda.get_device_properties(0)
        place = f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB, driver {driver_version()}, {cores} CPU cores"
    versions = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}"
    return {"where": f"{place}, {versions}, {time.strftime('%Y-%m-%d')}", "device": device}


def start_server() -> None:
    """The server forks the parts' processes, without CUDA, and imports for all of them. Takes seconds.

    It also loads the compiled operator, which the first time takes longer than a part may.
    """
    CONTEXT.set_forkserver_preload([*MODULES, "pipeline.crops.cpu_operator"])
    first = CONTEXT.Process(target=die_with_parent)
    first.start()
    first.join()


def run_part(measure: Measurement, case: Case, seconds: float) -> Iterator[Line]:
    """The lines of a part as they come, from a process of its own, which is killed after `seconds`."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    case = replace(case, seconds=REHEARSED_S if case.rehearsal else MEASURED * seconds)
    process = CONTEXT.Process(target=send_lines, args=(measure, case, sender))
    end = time.monotonic() + seconds
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            yield receiver.recv()
        yield Line("", error=f"stopped after {seconds:.0f} s")
    except EOFError:
        process.join()
        if process.exitcode:
            yield Line("", error=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def send_lines(measure: Measurement, case: Case, sender: Connection) -> None:
    die_with_parent()
    torch.set_num_threads(max(1, case.threads // 2) if case.rehearsal else 1)
    for line in attempt("", measure, case):
        sender.send(line)
