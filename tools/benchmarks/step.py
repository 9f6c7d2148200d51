"""Time, memory and FLOPs of one training step, against a loop over crops and unmasked crops; and the time of drawing masks."""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, default_levels
from model.losses import LossWeights, random_directions
from model.masks import STRATEGIES, MaskPlan, MultiCropMaskGenerator
from model.predictor import Predictor
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD
from tools.benchmarks.measure import Step, median_times, peak_bytes, table, target
from tools.benchmarks.naive import naive_losses

ENCODERS = {"small": "vit_small_patch16_dinov3", "tiny": "vit_tiny_patch16_dinov3_qkvb"}
GLOBAL, LOCAL = 224, 96
CONTEXT_RATIO = 0.4
MASKED_IMAGES = 256
# (figure, row to compare `ours/global_only` with, maximum ratio)
ANYWHERE = (("flops", "naive", 0.5), ("flops", "unmasked-2", 1.0))
ON_GPU = (
    *(("time_s", "naive", 0.5), ("time_s", "unmasked-2", 1.05)),
    *(("peak_bytes", "naive", 0.6), ("peak_bytes", "single-crop", 1.6)),
)
TARGETS = {"cpu": (*ANYWHERE, ("time_s", "naive", 0.55)), "cuda": (*ANYWHERE, *ON_GPU)}
MAX_MASK_MS = 0.5  # on a GPU


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of `name`, `time_s`, `peak_bytes`, `flops`: one step each, and one draw of masks for 256 images each."""
    if options.device == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; write cpu or auto")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    encoder, compiled = ENCODERS[options.model], STRATEGIES if options.compile else ()
    steps = make_steps(encoder, options.batch, device, compiled, context_ratio=options.context_ratio)
    draws: dict[str, Step] = mask_steps(device)
    times = median_times(steps, options.rounds, device) | median_times(draws, 5 * options.rounds, device)
    rows: list[dict[str, Any]] = [
        {"name": name, "time_s": times[name], "flops": count_flops(step), "peak_bytes": peak_bytes(step, device)}
        for name, step in (steps | draws).items()
    ]
    where = "GPU, bfloat16" if device.type == "cuda" else f"CPU, float32, {options.threads} threads"
    print(f"{encoder}, {options.batch} images, {where}; masks of {MASKED_IMAGES} images")
    print_rows({row["name"]: row for row in rows}, device)
    return rows


def count_flops(step: Step) -> int:
    """Return the FLOPs of a step, attention included; those of compiled code are hidden."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def print_rows(rows: dict[str, dict[str, Any]], device: torch.device) -> None:
    cells = (
        (
            name, f"{row['time_s'] * 1e3:,.1f}", f"{row['flops'] / 1e9:,.1f}", f"{row['peak_bytes'] / 1e6:,.0f}",
            *(f"{row[key] / rows['naive'][key]:.3f}" for key in ("flops", "time_s", "peak_bytes")),
        )
        for name, row in rows.items()
    )  # fmt: skip
    print(table(["row", "ms", "GFLOP", "peak MB", "FLOPs/naive", "time/naive", "peak/naive"], cells))
    for key, other, maximum in TARGETS[device.type]:
        share = rows["ours/global_only"][key] / rows[other][key]
        print(target(f"ours/global_only {key} / {other}", share, "<=", maximum))
    if device.type == "cuda":
        for name in STRATEGIES:
            print(target(f"masks/{name}, ms", 1e3 * rows[f"masks/{name}"]["time_s"], "<=", MAX_MASK_MS))


def make_steps(
    encoder: str,
    batch: int,
    device: torch.device,
    compiled: Sequence[str] = (),
    context_ratio: float = CONTEXT_RATIO,
) -> dict[str, Step]:
    """Return forward, backward and target update of every row, on the same images and weights, which no step changes.

    `compiled` names strategies for further rows.
    """

    def plan_of(strategy: str, num_global: int, num_local: int) -> MaskPlan:
        masks = MultiCropMaskGenerator(strategy, num_global, num_local, context_ratio=context_ratio, device=device)
        return masks(batch)

    all_crops, plan = draw_batch(batch, 2, 6, device), plan_of("global_only", 2, 6)
    model = make_model(encoder, 2).to(device)
    steps = {f"ours/{name}": make_step(model, all_crops, plan_of(name, 2, 6)) for name in STRATEGIES}
    steps["naive"] = make_step(model, all_crops, plan, naive_losses)
    steps["unmasked-2"] = make_step(model, draw_batch(batch, 2, 0, device), unmasked(plan))
    steps["unmasked-2+6"] = make_step(model, all_crops, unmasked(plan))
    single = make_model(encoder, 1, LossWeights(view=0.0, sigreg=0.0)).to(device)
    steps["single-crop"] = make_step(single, draw_batch(batch, 1, 0, device), plan_of("global_only", 1, 0))
    for name in compiled:
        copied = copy.deepcopy(model)
        copied.compile(dynamic=False)  # as training.compile does
        steps[f"ours/{name}/compiled"] = make_step(copied, all_crops, plan_of(name, 2, 6))
    return steps


def mask_steps(device: torch.device) -> dict[str, Step]:
    """Return one draw of masks for MASKED_IMAGES images by strategy."""
    masks = {name: MultiCropMaskGenerator(name, 2, 6, device=device) for name in STRATEGIES}
    return {f"masks/{name}": partial(generator, MASKED_IMAGES) for name, generator in masks.items()}


def make_model(encoder: str, num_global: int, weights: LossWeights | None = None) -> HJEPA:
    torch.manual_seed(0)
    built = MultiCropEncoder(encoder, [GLOBAL, LOCAL], mean=IMAGENET_MEAN, std=IMAGENET_STD)
    levels = default_levels(built.depth)
    return HJEPA(
        built,
        Predictor(built.width, built.width, 6, 6 if built.width % 24 == 0 else 4, len(levels)),
        levels,
        num_global_crops=num_global,
        global_crop_size=GLOBAL,
        projector_hidden=2048,
        projector_dim=256,
        sigreg_knots=17,
        weights=weights or LossWeights(),
    )


def draw_batch(batch: int, num_global: int, num_local: int, device: torch.device) -> dict[str, Any]:
    """Return random inputs of `HJEPA.forward`, drawn on the CPU so that they are the same on every device."""
    torch.manual_seed(1)
    sizes = [GLOBAL] * num_global + [LOCAL] * num_local
    corners = torch.rand(batch, len(sizes), 2, 2).sort(dim=2).values
    directions = random_directions(256, 256, torch.Generator().manual_seed(0), torch.device("cpu"))
    return {
        "crops": [torch.randn(batch, 3, size, size).to(device) for size in sizes],
        "boxes": torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.05], dim=-1).to(device),
        "flips": (torch.rand(batch, len(sizes)) < 0.5).to(device),
        "directions": directions.to(device),
    }


def unmasked(plan: MaskPlan) -> MaskPlan:
    """Return the same queries with every token of the globals encoded and seen."""
    (images, num_global), tokens = plan.context.shape[:2], (GLOBAL // 16) ** 2
    context = torch.arange(tokens, device=plan.context.device).expand(images, num_global, -1)
    sources = torch.arange(num_global * tokens, device=plan.context.device).view(1, num_global, -1)
    return MaskPlan(context, plan.queries, sources.expand(images, -1, -1))


def make_step(
    model: HJEPA, batch: dict[str, Any], plan: MaskPlan, losses: Callable[..., dict[str, torch.Tensor]] = HJEPA.__call__
) -> Step:
    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=plan.context.device.type == "cuda"):
            total = losses(model, **batch, plan=plan)["loss"]
        total.backward()
        model.zero_grad(set_to_none=True)
        model.update_target(0.99)

    return step
