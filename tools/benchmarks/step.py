"""Time, memory, FLOPs and calls of one training step, against the naive loop and unmasked crops; time of drawing masks."""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, default_levels
from model.losses import LossWeights, random_directions
from model.masks import STRATEGIES, MaskPlan, MultiCropMaskGenerator
from model.predictor import Predictor
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD
from tools.benchmarks.measure import Step, count, median_times
from tools.benchmarks.naive import naive_losses
from tools.benchmarks.tables import table, target

ENCODERS = {"small": "vit_small_patch16_dinov3", "tiny": "vit_tiny_patch16_dinov3_qkvb"}
GLOBAL, LOCAL = 224, 96
WEIGHTS = LossWeights()
MASKED_IMAGES = 256
# What is compared of `ours/global_only`, with which row, and the largest share that is wanted.
EVERYWHERE = (("flops", "naive", 0.5), ("flops", "unmasked-2", 1.0))
TARGETS = {
    "cpu": (*EVERYWHERE, ("time_s", "naive", 0.55)),
    "cuda": (
        *EVERYWHERE,
        ("time_s", "naive", 0.5),
        ("time_s", "unmasked-2", 1.05),
        ("peak_bytes", "naive", 0.6),
        ("peak_bytes", "single-crop", 1.6),
    ),
}
MASK_TARGET_MS = 0.5  # on a GPU


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", choices=ENCODERS, default="small", help="The encoder. The default is %(default)s.")
    command.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="The default is %(default)s.")
    command.add_argument(
        "--batch", type=int, default=4, help="The images of a batch, of 2 + 6 crops each. The default is %(default)s."
    )
    command.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="How often each row is measured, interleaved; medians are printed. The default is %(default)s.",
    )
    command.add_argument(
        "--context-ratio",
        type=float,
        default=0.4,
        help="The share of a global's tokens that is encoded. The default is %(default)s.",
    )
    command.add_argument("--threads", type=int, default=1, help="The threads of torch. The default is %(default)s.")
    command.add_argument(
        "--compile", action="store_true", help="Add rows of the compiled step, which takes minutes to compile."
    )


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `name`, `time_s`, `peak_bytes`, `flops`, `calls`: one step each, and one draw of masks for 256 images each."""
    device = _device(given.device)
    torch.set_num_threads(given.threads)
    steps = make_steps(
        ENCODERS[given.model], given.batch, given.context_ratio, device, STRATEGIES if given.compile else ()
    )
    draws = mask_steps(device)
    times = median_times(steps, given.repeats, device) | median_times(draws, 5 * given.repeats, device)
    rows = [{"name": name, "time_s": times[name], **count(step, device)} for name, step in (steps | draws).items()]
    where = "GPU, bfloat16" if device.type == "cuda" else f"CPU, float32, {given.threads} threads"
    print(f"{ENCODERS[given.model]}, {given.batch} images, {where}; masks of {MASKED_IMAGES} images")
    report(rows, device)
    return rows


def report(rows: list[dict[str, Any]], device: torch.device) -> None:
    by_name = {row["name"]: row for row in rows}
    naive = by_name["naive"]
    shown = (
        (
            row["name"], f"{row['time_s'] * 1e3:,.1f}", f"{row['flops'] / 1e9:,.1f}", f"{row['peak_bytes'] / 1e6:,.0f}",
            row["calls"], *(f"{row[key] / naive[key]:.3f}" for key in ("flops", "time_s", "peak_bytes")),
        )
        for row in rows
    )  # fmt: skip
    print(table(["row", "ms", "GFLOP", "peak MB", "calls", "FLOPs/naive", "time/naive", "peak/naive"], shown))
    for key, other, most in TARGETS[device.type]:
        share = by_name["ours/global_only"][key] / by_name[other][key]
        print(target(f"ours/global_only {key} / {other}", share, "<=", most))
    if device.type == "cuda":
        for strategy in STRATEGIES:
            print(target(f"masks/{strategy}, ms", 1e3 * by_name[f"masks/{strategy}"]["time_s"], "<=", MASK_TARGET_MS))


def _device(name: str) -> torch.device:
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; write cpu or auto")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def make_steps(
    encoder: str, batch: int, context_ratio: float, device: torch.device, compiled: Sequence[str] = (),
    backend: str = "inductor",
) -> dict[str, Step]:  # fmt: skip
    """Forward, backward and target update of every row, on the same images and weights, which no step changes.

    `compiled`: strategies of further rows. `backend`: of torch.compile; `eager` traces and compiles nothing.
    """

    def plan_of(strategy: str, num_global: int, num_local: int) -> MaskPlan:
        masks = MultiCropMaskGenerator(strategy, num_global, num_local, context_ratio=context_ratio, device=device)
        return masks(batch)

    everything, plan = draw_batch(batch, 2, 6, device), plan_of("global_only", 2, 6)
    model = make_model(encoder, 2).to(device)
    steps = {f"ours/{name}": _step(model, everything, plan_of(name, 2, 6)) for name in STRATEGIES}
    steps["naive"] = _step(model, everything, plan, naive_losses)
    steps["unmasked-2"] = _step(model, draw_batch(batch, 2, 0, device), unmasked(plan))
    steps["unmasked-2+6"] = _step(model, everything, unmasked(plan))
    single = make_model(encoder, 1, LossWeights(view=0.0, sigreg=0.0)).to(device)
    steps["single-crop"] = _step(single, draw_batch(batch, 1, 0, device), plan_of("global_only", 1, 0))
    for name in compiled:
        copied = copy.deepcopy(model)
        copied.compile(dynamic=False, backend=backend)  # as training.compile does
        steps[f"ours/{name}/compiled"] = _step(copied, everything, plan_of(name, 2, 6))
    return steps


def mask_steps(device: torch.device) -> dict[str, Step]:
    """The masks of each strategy for MASKED_IMAGES images."""
    masks = {name: MultiCropMaskGenerator(name, 2, 6, device=device) for name in STRATEGIES}
    return {f"masks/{name}": partial(generator, MASKED_IMAGES) for name, generator in masks.items()}


def make_model(encoder: str, num_global: int, weights: LossWeights = WEIGHTS) -> HJEPA:
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
        weights=weights,
    )


def draw_batch(batch: int, num_global: int, num_local: int, device: torch.device) -> dict[str, Any]:
    """The same on every device: drawn on the CPU."""
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
    """The same queries, but every token of the globals is encoded and seen."""
    (images, num_global), tokens = plan.context.shape[:2], (GLOBAL // 16) ** 2
    context = torch.arange(tokens, device=plan.context.device).expand(images, num_global, -1)
    sources = torch.arange(num_global * tokens, device=plan.context.device).view(1, num_global, -1)
    return MaskPlan(context, plan.queries, sources.expand(images, -1, -1))


def _step(
    model: HJEPA, batch: dict[str, Any], plan: MaskPlan, losses: Callable[..., dict[str, torch.Tensor]] = HJEPA.__call__
) -> Step:
    use_amp = plan.context.device.type == "cuda"

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=use_amp):
            total = losses(model, **batch, plan=plan)["loss"]
        total.backward()
        model.zero_grad(set_to_none=True)
        model.update_target(0.99)

    return step
