"""Time, memory, FLOPs and operator calls of one training step, against the naive loop and unmasked crops."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, default_levels
from model.losses import random_directions
from model.masks import STRATEGIES, MaskPlan, MultiCropMaskGenerator
from tools.bench_naive import naive_losses

ENCODERS = {"small": "vit_small_patch16_dinov3", "tiny": "vit_tiny_patch16_dinov3_qkvb"}
GLOBAL, LOCAL = 224, 96
TARGETS = (("flops", "naive", 0.5), ("flops", "unmasked-2", 1.0), ("time_s", "naive", 0.55))


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", choices=ENCODERS, default="small", help="encoder; default: %(default)s")
    command.add_argument("--batch", type=int, default=4, help="images of 2 + 6 crops; default: %(default)s")
    command.add_argument("--repeats", type=int, default=5, help="interleaved; medians are given; default: %(default)s")
    command.add_argument("--context-ratio", type=float, default=0.4, help="of a global's tokens; default: %(default)s")
    command.add_argument("--threads", type=int, default=1, help="of torch; default: %(default)s")


def run(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(parsed.threads)
    steps = make_steps(ENCODERS[parsed.model], parsed.batch, parsed.context_ratio)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # the first one allocates
    for _ in range(parsed.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        rows.append({"name": name, "time_s": statistics.median(times[name]), **count(step)})
    print(f"{ENCODERS[parsed.model]}, {parsed.batch} images, {parsed.threads} threads, CPU, float32")
    print(f"{'row':34} {'time ms':>8} {'GFLOP':>7} {'peak MB':>8} {'calls':>6} {'flops/naive':>12} {'time/naive':>11}")
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        shares = [row[key] / by_name["naive"][key] for key in ("flops", "time_s")]
        print(
            f"{row['name']:34} {row['time_s'] * 1e3:8.0f} {row['flops'] / 1e9:7.1f} {row['peak_bytes'] / 1e6:8.0f} "
            f"{row['calls']:6} {shares[0]:12.3f} {shares[1]:11.3f}"
        )
    for key, other, most in TARGETS:
        share = by_name["ours/global_only"][key] / by_name[other][key]
        print(
            f"ours/global_only {key} / {other}: {share:.3f}, wanted <= {most}: {'met' if share <= most else 'MISSED'}"
        )
    return rows


def make_steps(encoder: str, batch: int, context_ratio: float) -> dict[str, Callable[[], None]]:
    """Forward, backward and target update of every row, on the same images and weights."""
    everything = draw_batch(batch, 2, 6)
    steps = {}
    for strategy in STRATEGIES:
        masks = MultiCropMaskGenerator(strategy, 2, 6, context_ratio=context_ratio)
        steps[f"ours/{strategy}"] = _step(make_model(encoder, 2), everything, masks(batch))
    plan = MultiCropMaskGenerator("global_only", 2, 6, context_ratio=context_ratio)(batch)
    steps["naive"] = _step(make_model(encoder, 2), everything, plan, naive_losses)
    steps["unmasked-2"] = _step(make_model(encoder, 2), draw_batch(batch, 2, 0), unmasked(plan))
    steps["unmasked-2+6"] = _step(make_model(encoder, 2), everything, unmasked(plan))
    single = MultiCropMaskGenerator("global_only", 1, 0, context_ratio=context_ratio)(batch)
    steps["single-crop"] = _step(
        make_model(encoder, 1, view_weight=0.0, sigreg_weight=0.0), draw_batch(batch, 1, 0), single
    )
    return steps


def make_model(encoder: str, num_global: int, view_weight: float = 1.0, sigreg_weight: float = 0.05) -> HJEPA:
    torch.manual_seed(0)
    built = MultiCropEncoder(encoder, [GLOBAL, LOCAL])
    return HJEPA(
        built,
        default_levels(built.depth),
        num_global_crops=num_global,
        global_crop_size=GLOBAL,
        predictor_width=built.width,
        predictor_depth=6,
        predictor_heads=6 if built.width % 24 == 0 else 4,
        projector_hidden=2048,
        projector_dim=256,
        view_weight=view_weight,
        sigreg_weight=sigreg_weight,
        sigreg_knots=17,
    )


def draw_batch(batch: int, num_global: int, num_local: int) -> dict[str, Any]:
    torch.manual_seed(1)
    sizes = [GLOBAL] * num_global + [LOCAL] * num_local
    corners = torch.rand(batch, len(sizes), 2, 2).sort(dim=2).values
    return {
        "crops": [torch.randn(batch, 3, size, size) for size in sizes],
        "boxes": torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.05], dim=-1),
        "flips": torch.rand(batch, len(sizes)) < 0.5,
        "directions": random_directions(256, 256, torch.Generator().manual_seed(0), torch.device("cpu")),
    }


def unmasked(plan: MaskPlan) -> MaskPlan:
    """The same queries, but every token of the globals is encoded and seen."""
    shape, tokens = plan.context.shape[:2], (GLOBAL // 16) ** 2
    context = torch.arange(tokens).expand(*shape, -1)
    return MaskPlan(
        context, plan.queries, torch.arange(shape[1] * tokens).view(1, shape[1], -1).expand(shape[0], -1, -1)
    )


def _step(
    model: HJEPA, batch: dict[str, Any], plan: MaskPlan, losses: Callable[..., dict[str, torch.Tensor]] = HJEPA.forward
) -> Callable[[], None]:
    def step() -> None:
        losses(model, **batch, plan=plan)["loss"].backward()
        model.zero_grad(set_to_none=True)
        model.update_target(0.99)

    return step


class _CallCounter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], None]) -> dict[str, int]:
    """FLOPs (attention included), operator calls, and the most bytes allocated above what was there before."""
    flops, calls = FlopCounterMode(display=False), _CallCounter()
    with flops:
        step()
    with calls:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return {"peak_bytes": peak, "flops": flops.get_total_flops(), "calls": calls.calls}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.bench_step", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here too")
    add_arguments(parser)
    given = parser.parse_args()
    figures = run(given)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
