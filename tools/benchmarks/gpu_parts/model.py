"""Parts of `bench.py gpu` on the model: the step, training on real batches, and a save."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from model.losses import random_directions
from model.masks import STRATEGIES
from pipeline.batch import CropBatch
from tools.benchmarks import save as bench_save
from tools.benchmarks.gpu_parts.data import WAYS, way_options
from tools.benchmarks.gpu_parts.part import Case, Line, attempt, part
from tools.benchmarks.measure import cpu_seconds, median_times, peak_bytes
from tools.benchmarks.step import MASKED_IMAGES, make_steps, mask_steps
from train.build import amp_enabled, build_dataset, build_masks, build_model, build_training_loader
from train.config.load import load_config
from train.config.schema import Config
from train.optim import build_optimizer

TINY = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, init_values: 0.1}"
REHEARSAL = (
    "device=cpu", "data.batch_size=8", "data.multicrop.global_crop_size=32", "data.multicrop.local_crop_size=16",
    "model.encoder=vit_small_patch16_dinov3", f"model.encoder_kwargs={TINY}", "model.predictor_width=24",
    "model.predictor_depth=1", "model.predictor_heads=2", "model.projector_hidden=16", "model.projector_dim=8",
)  # fmt: skip
WARM_STEPS = 3


def encoders(case: Case) -> dict[str, str]:
    if case.rehearsal:
        return {"ViT-T": "vit_tiny_patch16_dinov3_qkvb"}
    return {"ViT-S": "vit_small_patch16_dinov3", "ViT-B": "vit_base_patch16_dinov3"}


def settings(case: Case, encoder: str) -> Config:
    given = ["data.dataset=custom", f"data.data_path={case.folder}", f"data.num_workers={case.threads}"]
    given += REHEARSAL if case.rehearsal else [f"model.encoder={encoder}"]
    return load_config(bench_save.CONFIG, given)


@part("step", 0.12)
def step(case: Case) -> Iterator[Line]:
    """Forward, backward and target update, no data; the naive loop encodes each crop whole."""
    device, (batch, repeats) = case.torch_device, (1, 1) if case.rehearsal else (64, 5)
    for name, encoder in encoders(case).items():
        steps = make_steps(encoder, batch, 0.4, device)
        yield from attempt(
            name, lambda name=name, steps=steps: step_lines(f"{name}, batch {batch}", steps, repeats, device)
        )
        del steps
    times = median_times(mask_steps(device), 5, device)
    for name, seconds in times.items():
        yield Line(f"{name}, {MASKED_IMAGES} images", {"ms": 1e3 * seconds})


@part("compiled step", 0.14)
def compiled_step(case: Case) -> Iterator[Line]:
    """The first step compiles, which takes minutes; a rehearsal traces alone."""
    device, (batch, repeats) = case.torch_device, (1, 1) if case.rehearsal else (64, 5)
    name, encoder = next(iter(encoders(case).items()))
    backend = "eager" if case.rehearsal else "inductor"
    steps = make_steps(encoder, batch, 0.4, device, STRATEGIES[:1], backend)
    kept = {key: value for key, value in steps.items() if key == "naive" or key.startswith(f"ours/{STRATEGIES[0]}")}
    title = f"{name}, batch {batch}" + (" (traced, not compiled)" if case.rehearsal else "")
    yield from step_lines(title, kept, repeats, device)


def step_lines(title: str, steps: dict[str, Any], repeats: int, device: torch.device) -> Iterator[Line]:
    times = median_times(steps, repeats, device)
    peaks = {name: peak_bytes(one, device) for name, one in steps.items()}
    for name, seconds in times.items():
        figures = {"ms": 1e3 * seconds, "MB": peaks[name] / 1e6}
        shares = {"of naive's time": seconds / times["naive"], "of its memory": peaks[name] / peaks["naive"]}
        yield Line(f"{title}, {name}", figures | shares)


@part("training", 0.25)
def training(case: Case) -> Iterator[Line]:
    """Real batches, and the same step on one kept batch: what is missing to its rate is the price of the data."""
    names = encoders(case)
    seconds = case.seconds / (3 * len(WAYS) * len(names))
    for name, encoder in names.items():
        for way in WAYS:
            yield from attempt(f"{name}, {way}", train, case, name, encoder, way, seconds)


class Trained:
    """A model and one update of it, as the training loop makes it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.model = build_model(config, device)
        self.masks = build_masks(config, self.model, device)
        self.optimizer = build_optimizer(
            self.model, config.training.weight_decay, config.training.betas, config.training.optimizer
        )
        self.use_amp = amp_enabled(config, device)
        generator = torch.Generator(device).manual_seed(0)
        self.directions = random_directions(config.model.projector_dim, config.loss.sigreg_slices, generator, device)

    def update(self, batch: CropBatch) -> None:
        plan = self.masks(len(batch.labels))
        with torch.autocast(self.masks.device.type, torch.bfloat16, enabled=self.use_amp):
            loss = self.model(batch.crops, batch.boxes, batch.flips, plan, self.directions)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_target(0.99)


def train(case: Case, name: str, encoder: str, way: str, seconds: float) -> Iterator[Line]:
    config = settings(case, encoder)
    if not case.rehearsal:
        torch.cuda.reset_peak_memory_stats()
    trained = Trained(config, case.torch_device)
    loader = build_training_loader(config, build_dataset(config), **way_options(case, way))
    stream = endless(loader)
    for _ in range(WARM_STEPS):
        batch = next(stream)
        trained.update(batch)
    wait(case)
    started, cpu, waited, steps = time.perf_counter(), cpu_seconds(), 0.0, 0
    while time.perf_counter() - started < seconds:
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        trained.update(batch)
        steps += 1
    wait(case)
    elapsed, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    alone = steps_per_second(case, trained, batch, seconds / 2)
    figures = {
        "images/s": steps * len(batch.labels) / elapsed,
        "% waiting for data": 100 * waited / elapsed,
        "% slower than without data": 100 * (1 - steps / elapsed / alone),
        "cores busy": cpu / elapsed,
    }
    if not case.rehearsal:
        figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    yield Line(f"{name}, batch {len(batch.labels)}, {way}", figures)


def steps_per_second(case: Case, trained: Trained, batch: CropBatch, seconds: float) -> float:
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        trained.update(batch)
        steps += 1
    wait(case)
    return steps / (time.perf_counter() - started)


def wait(case: Case) -> None:
    if not case.rehearsal:
        torch.cuda.synchronize()


def endless(loader: Any) -> Iterator[CropBatch]:
    while True:
        yield from loader


@part("save", 0.05)
def save(case: Case) -> Iterator[Line]:
    """The steps after a save while a thread writes it, and writing it in the loop."""
    config = settings(case, next(reversed(encoders(case).values())))
    figures = bench_save.measure(config, saves=2, steps=2)
    yield Line(
        f"checkpoint of {figures['bytes'] / 2**20:,.0f} MiB",
        {
            "x a step, with the save": figures["after_s"][0] / figures["step_s"],
            "x the step after it": figures["after_s"][1] / figures["step_s"],
            "steps if written in the loop": figures["written_in_loop_s"] / figures["step_s"],
        },
    )
