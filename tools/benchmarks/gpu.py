"""Everything that only a GPU can tell, as one table for the README; `--device cpu` rehearses it with small sizes.

Each measurement runs in a subprocess, within its share of `--minutes`. One that fails or takes too long gets a row with the
reason and does not stop the others. Needs no network.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nvidia.dali
import torch

from pipeline.dataset import resolve_device
from tools.benchmarks.loaders import decode_only, ours
from tools.benchmarks.measure import Loader, LoaderSetup, choose, cpu_seconds, error_line, seconds_per_image, synchronize, table
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.step import CONFIG, ENCODERS, MASKED_IMAGES, measure_rows
from tools.checks.machine import driver_version
from tools.own_process import die_with_parent
from train.config.load import load_config
from train.trainer import Trainer

NUM_PHOTOGRAPHS, NUM_REHEARSED = 512, 48
CONTEXT = multiprocessing.get_context("forkserver")
MEASURED_SHARE = 0.7  # of a measurement's time limit; the rest is for first batches and for building models
# The smallest model that has all parts of the real one.
TINY_ENCODER = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, init_values: 0.1}"
REHEARSAL = (
    "device=cpu", "data.batch_size=8", "data.multicrop.global_crop_size=32", "data.multicrop.local_crop_size=16",
    "model.encoder=vit_small_patch16_dinov3", f"model.encoder_kwargs={TINY_ENCODER}", "model.predictor_width=24",
    "model.predictor_depth=1", "model.predictor_heads=2", "model.projector_hidden=16", "model.projector_dim=8",
)  # fmt: skip
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class GpuCase:
    """`device`: `gpu`, or `cpu` for a rehearsal. `seconds`: how long to repeat what has no fixed number of rounds."""

    folder: Path
    device: str
    threads: int
    seconds: float = 1.0

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Result:
    """One row of the table: figures by unit, or the reason why there are none."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    error: str = ""
    part: str = ""

    @property
    def text(self) -> str:
        figures = (f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}" for unit, value in self.figures.items())
        return f"FAILED: {self.error}" if self.error else ", ".join(figures)


Measurement = Callable[[GpuCase], list[Result]]


def loader_rate(name: str, loader: Loader, device: str, case: GpuCase) -> list[Result]:
    """Measure a loader as training uses it, with uint8 crops; the CPU load is that of this process."""
    setup = LoaderSetup(case.folder, 8 if case.rehearsal else 128, case.threads, device)
    wall, cpu = seconds_per_image(loader, setup, 10**9, case.seconds)
    return [Result(name, {"images/s": 1 / wall, "CPU ms an image": 1e3 * cpu, "cores busy": cpu / wall})]


def step_results(name: str, encoder: str, case: GpuCase) -> list[Result]:
    """Measure forward, backward and target update without data, and masks for a batch; `naive` encodes one crop at a time."""
    batch, rounds = (1, 1) if case.rehearsal else (64, 5)
    results = []
    for row in measure_rows(encoder, batch, rounds, torch.device("cpu" if case.rehearsal else "cuda")):
        images = MASKED_IMAGES if row["name"].startswith("masks/") else batch
        figures = {"ms": 1e3 * row["time_s"], "MB": row["peak_bytes"] / 1e6}
        results.append(Result(f"{name}, {row['name']}, {images} images", figures))
    return results


def training_rate(name: str, encoder: str, crop_device: str, case: GpuCase) -> list[Result]:
    """Train on real batches for `case.seconds`, after a few steps that are not timed."""
    settings = [f"data.data_path={case.folder}", f"data.num_workers={case.threads}", f"data.crop_device={crop_device}"]
    settings += ["data.dataset=custom", *(REHEARSAL if case.rehearsal else [f"model.encoder={encoder}"])]
    trainer = Trainer(load_config(CONFIG, settings))
    for _ in range(WARM_UP_STEPS):
        trainer.train_step()
    synchronize(case.device)
    started, cpu, waited, images = time.perf_counter(), cpu_seconds(), trainer.state.wait_s, trainer.state.images
    while time.perf_counter() - started < case.seconds:
        trainer.train_step()
    synchronize(case.device)
    elapsed = time.perf_counter() - started
    figures = {
        "images/s": (trainer.state.images - images) / elapsed,
        "% waiting for data": 100 * (trainer.state.wait_s - waited) / elapsed,
        "cores busy": (cpu_seconds() - cpu) / elapsed,
    }
    if not case.rehearsal:
        free, total = torch.cuda.mem_get_info()
        figures["peak GiB of torch"] = torch.cuda.max_memory_allocated() / 2**30
        figures["GiB of DALI and libraries"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    return [Result(f"{name}, batch {trainer.config.data.batch_size}", figures)]


PARTS = ("images/s", "step", "training")


def plan_measurements(device: str) -> Iterator[tuple[str, str, Measurement, float]]:
    """Yield (part, name, function, weight of its time limit), in the order of the table."""
    rehearsal = device == "cpu"  # which makes the crops of every row on the CPU
    encoders = {"ViT-S": ENCODERS["small"], "ViT-B": "vit_base_patch16_dinov3"}
    if rehearsal:
        encoders = {"ViT-T": ENCODERS["tiny"]}
    crop_devices = {"GPU crops": "gpu", "hybrid (CPU crops, uploaded)": "cpu"}
    loaders: dict[str, tuple[Loader, str]] = {"decode only": (decode_only, device)}
    for name, where in crop_devices.items():
        loaders[name] = (partial(ours, normalized=False, crop_device="auto" if rehearsal else where), device)
    loaders["CPU only"] = (partial(ours, normalized=False), "cpu")
    for name, (loader, used) in loaders.items():
        yield "images/s", name, partial(loader_rate, name, loader, used), 1.0
    for name, encoder in encoders.items():
        yield "step", name, partial(step_results, name, encoder), 1.5
    for name, encoder in encoders.items():
        for way, where in crop_devices.items():
            title = f"{name}, {way}"
            yield "training", title, partial(training_rate, title, encoder, "auto" if rehearsal else where), 1.2


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    device, parts = resolve_device(options.device), choose("--parts", options.parts, PARTS)
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; --device cpu rehearses without one")
    figures: dict[str, Any] = {"where": describe_machine(device), "device": device, "minutes": options.minutes}
    results: list[Result] = []
    planned = [measurement for measurement in plan_measurements(device) if measurement[0] in parts]
    num_photographs = NUM_REHEARSED if device == "cpu" else NUM_PHOTOGRAPHS
    with benchmark_shards(options.shards, num_photographs, options.threads) as folder:
        start_server()
        case, started = GpuCase(folder, device, options.threads), time.monotonic()
        for number, (part, name, measurement, weight) in enumerate(planned):
            left_s = 60 * options.minutes - (time.monotonic() - started)
            limit_s = max(1.0, left_s * weight / sum(later[3] for later in planned[number:]))
            for result in run_limited(name, measurement, case, limit_s):
                results.append(replace(result, part=part))
                print(f"[{time.monotonic() - started:4.0f} s] {part}: {result.name}: {result.text}", flush=True)
            figures["lines"] = [asdict(result) for result in results]
            if options.json:  # at once: the results stay if a later measurement takes the machine down
                options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{figures['where']}; `python tools/bench.py gpu`\n")
    print(table(["part", "", "figures"], ((result.part, result.name, result.text) for result in results), left=3))
    return figures


def describe_machine(device: str) -> str:
    machine = f"{len(os.sched_getaffinity(0))} CPU cores"
    if device == "gpu":
        gpu = torch.cuda.get_device_properties(0)
        machine = f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB, driver {driver_version()}, {machine}"
    versions = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}"
    return f"{machine}{', a rehearsal' if device == 'cpu' else ''}, {versions}, {time.strftime('%Y-%m-%d')}"


def start_server() -> None:
    """Start the server that forks the subprocesses, without CUDA, after it has imported everything they need.

    It also loads the compiled operator: compiling it for the first time takes longer than a measurement's time limit.
    """
    CONTEXT.set_forkserver_preload([__name__, "pipeline.crops.cpu_operator"])
    first = CONTEXT.Process(target=die_with_parent)
    first.start()
    first.join()


def run_limited(name: str, measurement: Measurement, case: GpuCase, limit_s: float) -> list[Result]:
    """Return the results of a measurement, or one row with the reason why there are none, after at most `limit_s`."""
    # A process rather than a thread: a measurement can hang or crash in CUDA, and only the kernel can end it then.
    receiver, sender = CONTEXT.Pipe(duplex=False)
    case = case if case.rehearsal else replace(case, seconds=MEASURED_SHARE * limit_s)
    process = CONTEXT.Process(target=send_results, args=(name, measurement, case, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit_s) else [Result(name, error=f"stopped after {limit_s:.0f} s")]
    except EOFError:
        process.join()
        return [Result(name, error=f"its process ended with exit code {process.exitcode}")]
    finally:
        process.kill()
        process.join()


def send_results(name: str, measurement: Measurement, case: GpuCase, sender: Connection) -> None:
    die_with_parent()
    torch.set_num_threads(max(1, case.threads // 2) if case.rehearsal else 1)
    try:
        results = measurement(case)
    except Exception as error:  # noqa: BLE001  # a bug becomes a row: it must not stop the other measurements
        results = [Result(name, error=f"{type(error).__name__}: {error_line(error)}"[:200])]
    sender.send(results)
