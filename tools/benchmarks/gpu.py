"""Everything that only a GPU can tell, as one table for the README; `--device cpu` rehearses it with small sizes.

Each part runs in a subprocess, within its share of `--minutes`. A part that fails or takes too long gets a row with the
reason and does not stop the others. Needs no network.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nvidia.dali
import torch

from pipeline.dataset import resolve_device
from tools.benchmarks.loaders import decode_only, ours
from tools.benchmarks.measure import (
    Loader,
    LoaderSetup,
    Step,
    cpu_seconds,
    error_line,
    median_times,
    peak_bytes,
    seconds_per_image,
    step_seconds,
    synchronize,
    table,
)
from tools.benchmarks.photographs import benchmark_shards
from tools.benchmarks.step import ENCODERS, MASKED_IMAGES, make_steps, mask_steps
from tools.checks.check import Case, examine
from tools.checks.gpu import GPU_CHECKS, driver_version
from tools.own_process import die_with_parent
from train.checkpoint import CheckpointWriter
from train.config.load import load_config
from train.config.schema import Config
from train.trainer import Trainer

NUM_PHOTOGRAPHS, NUM_REHEARSED = 512, 48
CONTEXT = multiprocessing.get_context("forkserver")
MEASURED_SHARE = 0.7  # of a part's time; the rest is for first batches and for building models
REHEARSED_S = 5.0  # measured in each part of a rehearsal, whatever the minutes
CROP_DEVICES = {"GPU crops": "gpu", "hybrid (CPU crops, uploaded)": "cpu"}
CONFIG = Path(__file__).parents[2] / "configs" / "multicrop_training.yaml"
# The smallest model that has all parts of the real one.
TINY_ENCODER = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, init_values: 0.1}"
REHEARSAL = (
    "device=cpu", "data.batch_size=8", "data.multicrop.global_crop_size=32", "data.multicrop.local_crop_size=16",
    "model.encoder=vit_small_patch16_dinov3", f"model.encoder_kwargs={TINY_ENCODER}", "model.predictor_width=24",
    "model.predictor_depth=1", "model.predictor_heads=2", "model.projector_hidden=16", "model.projector_dim=8",
)  # fmt: skip
WARM_UP_STEPS = 3
# A bug or a missing feature becomes a row of the table: it must not stop the other measurements.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class GpuCase:
    """`device`: `gpu`, or `cpu` for a rehearsal. `seconds`: time limit for all measurements of a part together."""

    folder: Path
    device: str
    threads: int
    seconds: float = 60.0

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.rehearsal else torch.device("cuda", 0)


@dataclass(frozen=True)
class Result:
    """One row of the table: figures by unit, a note, or the reason why there is neither."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    error: str = ""
    part: str = ""

    @property
    def text(self) -> str:
        figures = (
            f"{value:,.0f} {unit}" if value == int(value) or abs(value) >= 100 else f"{value:.3g} {unit}"
            for unit, value in self.figures.items()
        )
        return "; ".join(filter(None, [", ".join(figures), self.note, self.error and f"FAILED: {self.error}"]))


Measurement = Callable[..., Iterable[Result]]


def attempt(name: str, measurement: Measurement, *arguments: Any) -> Iterator[Result]:
    """Yield the results of a measurement, and one more for what it raised, so that the next measurement still runs."""
    try:
        yield from measurement(*arguments)
    except FAILURES as error:
        yield Result(name, error=f"{type(error).__name__}: {error_line(error)}"[:200])


def check_machine(case: GpuCase) -> Iterator[Result]:
    """Run the doctor's checks of GPUs: versions, decoding and communication."""
    for name, check in GPU_CHECKS:
        finding = examine(check, Case())
        yield Result(name, note=finding.text) if finding.status != "fail" else Result(name, error=finding.text)


def measure_rates(case: GpuCase) -> Iterator[Result]:
    """Measure each loader as training uses it, with uint8 crops; the CPU load is that of this process."""
    setup = LoaderSetup(case.folder, 8 if case.rehearsal else 128, case.threads, case.device)
    loaders: dict[str, tuple[Loader, LoaderSetup]] = {"decode only": (decode_only, setup)}
    for name in CROP_DEVICES:
        loaders[name] = (partial(ours, normalized=False, crop_device=crop_device(case, name)), setup)
    loaders["CPU only"] = (partial(ours, normalized=False), replace(setup, device="cpu"))
    for name, (loader, used) in loaders.items():
        yield from attempt(name, loader_rate, name, loader, used, 0.2 * case.seconds)


def loader_rate(name: str, loader: Loader, setup: LoaderSetup, seconds: float) -> Iterator[Result]:
    wall, cpu = seconds_per_image(loader, setup, 10**9, seconds)
    yield Result(name, {"images/s": 1 / wall, "CPU ms an image": 1e3 * cpu, "cores busy": cpu / wall})


def crop_device(case: GpuCase, name: str) -> str:
    """Return where crops are made; a rehearsal replaces the GPU by the CPU."""
    return "auto" if case.rehearsal else CROP_DEVICES[name]


def encoders(case: GpuCase) -> dict[str, str]:
    if case.rehearsal:
        return {"ViT-T": ENCODERS["tiny"]}
    return {"ViT-S": ENCODERS["small"], "ViT-B": "vit_base_patch16_dinov3"}


def measure_steps(case: GpuCase) -> Iterator[Result]:
    """Measure forward, backward and target update without data; the naive loop encodes one crop at a time."""
    batch = 1 if case.rehearsal else 64
    for name, encoder in encoders(case).items():
        yield from attempt(
            name, step_results, case, f"{name}, batch {batch}", make_steps(encoder, batch, case.torch_device)
        )
    for name, seconds in median_times(mask_steps(case.torch_device), 5, case.torch_device).items():
        yield Result(f"{name}, {MASKED_IMAGES} images", {"ms": 1e3 * seconds})


def step_results(case: GpuCase, title: str, steps: dict[str, Step]) -> Iterator[Result]:
    times = median_times(steps, 1 if case.rehearsal else 5, case.torch_device)
    peaks = {name: peak_bytes(step, case.torch_device) for name, step in steps.items()}
    for name, seconds in times.items():
        figures = {"ms": 1e3 * seconds, "MB": peaks[name] / 1e6}
        ratios = {"of naive's time": seconds / times["naive"], "of its memory": peaks[name] / peaks["naive"]}
        yield Result(f"{title}, {name}", figures | ratios)


def settings(case: GpuCase, encoder: str, *changes: str) -> Config:
    data = ["data.dataset=custom", f"data.data_path={case.folder}", f"data.num_workers={case.threads}"]
    return load_config(CONFIG, [*data, *(REHEARSAL if case.rehearsal else [f"model.encoder={encoder}"]), *changes])


def measure_training(case: GpuCase) -> Iterator[Result]:
    """Train on real batches with each encoder and each crop device."""
    names = encoders(case)
    for name, encoder in names.items():
        for way in CROP_DEVICES:
            config = settings(case, encoder, f"data.crop_device={crop_device(case, way)}")
            seconds = case.seconds / (len(CROP_DEVICES) * len(names))
            yield from attempt(f"{name}, {way}", train_for, case, f"{name}, {way}", config, seconds)


def train_for(case: GpuCase, name: str, config: Config, seconds: float) -> Iterator[Result]:
    if not case.rehearsal:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config)
    for _ in range(WARM_UP_STEPS):
        trainer.train_step()
    synchronize(case.device)
    started, cpu, waited, images = time.perf_counter(), cpu_seconds(), trainer.state.wait_s, trainer.state.images
    while time.perf_counter() - started < seconds:
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
    yield Result(f"{name}, batch {config.data.batch_size}", figures)


def measure_save(case: GpuCase) -> Iterator[Result]:
    """Compare the steps after a save, while a background thread writes the checkpoint, with a step without one."""
    trainer = Trainer(settings(case, next(reversed(encoders(case).values()))))
    with TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 1, 0)
        plain = [step_seconds(trainer.train_step, case.torch_device) for _ in range(WARM_UP_STEPS + 1)][-1]
        started = time.perf_counter()
        writer.write(trainer.snapshot(None))
        copied = time.perf_counter() - started
        after = [step_seconds(trainer.train_step, case.torch_device) for _ in range(2)]
        writer.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    ratios = {"x a step, with the save": (copied + after[0]) / plain, "x the step after it": after[1] / plain}
    yield Result(f"checkpoint of {size / 2**20:,.0f} MiB", ratios)


# (name, function, share of the time), in the order of the table
PARTS: tuple[tuple[str, Measurement, float], ...] = (
    ("checks", check_machine, 0.05),
    ("images/s", measure_rates, 0.3),
    ("step", measure_steps, 0.2),
    ("training", measure_training, 0.32),
    ("save", measure_save, 0.05),
)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    device, parts = resolve_device(options.device), chosen_parts(options.parts)
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; --device cpu rehearses without one")
    figures: dict[str, Any] = {"where": describe_machine(device), "device": device, "minutes": options.minutes}
    results: list[Result] = []
    num_photographs = NUM_REHEARSED if device == "cpu" else NUM_PHOTOGRAPHS
    with benchmark_shards(options.shards, num_photographs, options.threads) as folder:
        start_server()
        started = time.monotonic()
        for number, (name, measurement, share) in enumerate(parts):
            left_s = 60 * options.minutes - (time.monotonic() - started)
            seconds = max(1.0, left_s * share / sum(later[2] for later in parts[number:]))
            for result in run_part(measurement, GpuCase(folder, device, options.threads), seconds):
                results.append(replace(result, part=name))
                print(f"[{time.monotonic() - started:4.0f} s] {name}: {result.name}: {result.text}", flush=True)
            figures["lines"] = [asdict(result) for result in results]
            if options.json:  # at once: the results stay if a later part takes the machine down
                options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{figures['where']}; `python tools/bench.py gpu`\n")
    print(table(["part", "", "figures"], ((result.part, result.name, result.text) for result in results), left=3))
    return figures


def chosen_parts(text: str | None) -> list[tuple[str, Measurement, float]]:
    known = [name for name, _, _ in PARTS]
    names = [name.strip() for name in text.split(",")] if text else known
    for name in names:
        if name not in known:
            raise ValueError(f"--parts: unknown part {name!r}, allowed are {', '.join(known)}")
    return [part for part in PARTS if part[0] in names]


def describe_machine(device: str) -> str:
    machine = f"{len(os.sched_getaffinity(0))} CPU cores"
    if device == "gpu":
        gpu = torch.cuda.get_device_properties(0)
        machine = f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB, driver {driver_version()}, {machine}"
    versions = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}"
    return f"{machine}{', a rehearsal' if device == 'cpu' else ''}, {versions}, {time.strftime('%Y-%m-%d')}"


def start_server() -> None:
    """Start the server that forks the parts' subprocesses, without CUDA, after it has imported everything they need.

    It also loads the compiled operator: compiling it for the first time takes longer than a part's time limit.
    """
    CONTEXT.set_forkserver_preload([__name__, "pipeline.crops.cpu_operator"])
    first = CONTEXT.Process(target=die_with_parent)
    first.start()
    first.join()


def run_part(measurement: Measurement, case: GpuCase, seconds: float) -> Iterator[Result]:
    """Yield the results of a part as they come, from a subprocess that is killed after `seconds`."""
    # A process rather than a thread: a measurement can hang or crash in CUDA, and only the kernel can end it then.
    receiver, sender = CONTEXT.Pipe(duplex=False)
    case = replace(case, seconds=REHEARSED_S if case.rehearsal else MEASURED_SHARE * seconds)
    process = CONTEXT.Process(target=send_results, args=(measurement, case, sender))
    end = time.monotonic() + seconds
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            yield receiver.recv()
        yield Result("", error=f"stopped after {seconds:.0f} s")
    except EOFError:
        process.join()
        if process.exitcode:
            yield Result("", error=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def send_results(measurement: Measurement, case: GpuCase, sender: Connection) -> None:
    die_with_parent()
    torch.set_num_threads(max(1, case.threads // 2) if case.rehearsal else 1)
    for result in attempt("", measurement, case):
        sender.send(result)
