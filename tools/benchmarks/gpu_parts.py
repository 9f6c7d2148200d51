"""The measurements of `bench.py gpu`; each runs in a process of its own, in a rehearsal on the CPU with small sizes."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import torch

from tools.benchmarks.loaders import decode_only, ours
from tools.benchmarks.measure import Loader, LoaderSetup, cpu_seconds, median_times, peak_bytes, seconds_per_image, synchronize
from tools.benchmarks.step import CONFIG, ENCODERS, make_steps
from train.checkpoint import write_checkpoint
from train.config.load import load_config
from train.trainer import Trainer

# Seconds that one measurement of a part takes on a GPU, with the start of its process.
PARTS = {"parity": 15, "images/s": 14, "training": 20, "step": 25, "memory": 15, "save": 25, "compile": 65}
CHECKED_SIZES = (224, 96, 32, 448)
REHEARSED = CONFIG.with_name("quickstart.yaml")  # a small model with all parts of the real one
WARM_UP_STEPS = 3
Figures = dict[str, float]
"""By unit."""


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

    def trainer(self, encoder: str, crop_device: str, *changes: str) -> Trainer:
        """Return a trainer after some steps, which allocate and compile."""
        settings = ["data.dataset=custom", f"data.data_path={self.folder}", f"data.num_workers={self.threads}", *changes]
        chosen = [] if self.rehearsal else [f"model.encoder={encoder}", f"data.crop_device={crop_device}"]
        trainer = Trainer(load_config(REHEARSED if self.rehearsal else CONFIG, settings + chosen))
        for _ in range(WARM_UP_STEPS):
            trainer.train_step()
        synchronize(self.device)
        return trainer


Measurement = Callable[[GpuCase], dict[str, Figures]]
"""Returns rows by name."""


def parity(case: GpuCase) -> dict[str, Figures]:
    """Compare the kernel's crops with the CPU operator's; a rehearsal only compiles it, for an H100."""
    from pipeline.crops.cubin import CropKernel, compile_kernel
    from pipeline.crops.fused import self_check

    started = time.perf_counter()
    if case.rehearsal:
        compile_kernel("sm_90")
        return {"compiled for sm_90, not run": {"s": time.perf_counter() - started}}
    self_check(CHECKED_SIZES, CropKernel(torch.device("cuda", 0)))
    return {f"equal bytes at {', '.join(map(str, CHECKED_SIZES))} px": {"s": time.perf_counter() - started}}


def loader_rate(name: str, loader: Loader, case: GpuCase) -> dict[str, Figures]:
    """Measure a loader as training uses it, with uint8 crops; the CPU load is that of this process."""
    setup = LoaderSetup(case.folder, 8 if case.rehearsal else 128, case.threads, case.device)
    wall, cpu = seconds_per_image(loader, setup, 10**9, case.seconds)
    return {name: {"images/s": 1 / wall, "CPU ms an image": 1e3 * cpu, "cores busy": cpu / wall}}


def training_rate(name: str, encoder: str, crop_device: str, compiled: str, case: GpuCase) -> dict[str, Figures]:
    """Train on new batches, then on one again and again: the difference is what the loader costs."""
    started = time.perf_counter()
    trainer = case.trainer(encoder, crop_device, f"training.compile={compiled}")
    figures, batch = {"s to start": time.perf_counter() - started}, next(trainer._batches)
    for unit in ("images/s", "images/s without the loader"):
        started, cpu, images = time.perf_counter(), cpu_seconds(), trainer.state.images
        while time.perf_counter() - started < case.seconds / 2:
            trainer.train_step()
        synchronize(case.device)
        elapsed = time.perf_counter() - started
        figures[unit] = (trainer.state.images - images) / elapsed
        figures.setdefault("cores busy", (cpu_seconds() - cpu) / elapsed)
        trainer._batches = repeat(batch)
    if not case.rehearsal:
        free, total = torch.cuda.mem_get_info()
        figures["peak GiB of torch"] = torch.cuda.max_memory_allocated() / 2**30
        figures["GiB of DALI and libraries"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    return {f"{name}, batch {trainer.config.data.batch_size}": figures}


def step_rows(name: str, encoder: str, part: str, case: GpuCase) -> dict[str, Figures]:
    """Measure the time or the memory of forward, backward and target update without data; `naive` loops over crops."""
    device, (batch, rounds) = torch.device("cpu" if case.rehearsal else "cuda"), (1, 1) if case.rehearsal else (64, 5)
    steps = make_steps(encoder, batch, device)
    if part == "memory":
        values, unit = {key: 1e-6 * peak_bytes(step, device) for key, step in steps.items()}, "MB"
    else:
        values, unit = {key: 1e3 * value for key, value in median_times(steps, rounds, device).items()}, "ms"
    return {f"{name}, {key}, {batch} images": {unit: value, "of naive": value / values["naive"]} for key, value in values.items()}


def save(name: str, encoder: str, case: GpuCase) -> dict[str, Figures]:
    """Save a checkpoint: how long training stands still for it, and how long the disk then takes beside it."""
    trainer = case.trainer(encoder, "cpu")
    trainer.snapshot(None)  # the first one allocates
    step_s = median_times({"step": trainer.train_step}, 3, trainer.device)["step"]
    started = time.perf_counter()
    snapshot = trainer.snapshot(None)
    trainer.train_step()
    synchronize(case.device)
    stepped = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = sum(file.stat().st_size for file in write_checkpoint(Path(folder), snapshot).iterdir())
    stood_s, disk_s = stepped - started - step_s, time.perf_counter() - stepped
    return {name: {"MB": num_bytes / 1e6, "ms of training": 1e3 * stood_s, "s to disk": disk_s}}


def plan(device: str) -> list[tuple[str, str, Measurement]]:
    """Return part, name and function of all measurements, in the order of the table."""
    models = {"ViT-S": ENCODERS["small"], "ViT-B": "vit_base_patch16_dinov3"} if device == "gpu" else {"ViT-T": ENCODERS["tiny"]}
    small, largest = next(iter(models)), list(models)[-1]
    ways = {"the kernel": "gpu", "DALI's graph": "dali", "CPU crops, uploaded": "cpu"}
    planned: list[tuple[str, str, Measurement]] = [("parity", "the kernel", parity)]
    loaders: dict[str, Loader] = {"decode only": decode_only}
    for name, where in ways.items():
        loaders[name] = partial(ours, normalized=False, crop_device=where if device == "gpu" else "auto")
    planned += [("images/s", name, partial(loader_rate, name, loader)) for name, loader in loaders.items()]
    for model, encoder in models.items():
        for way in ways if model == small else ("the kernel",):
            name = f"{model}, {way}"
            planned.append(("training", name, partial(training_rate, name, encoder, ways[way], "false")))
    for part in ("step", "memory"):
        planned += [(part, name, partial(step_rows, name, encoder, part)) for name, encoder in models.items()]
    planned.append(("save", largest, partial(save, largest, models[largest])))
    for how in ("true", "cudagraphs") if device == "gpu" else ("true",):
        name = f"{small}, training.compile={how}"
        planned.append(("compile", how, partial(training_rate, name, models[small], "gpu", how)))
    return planned
