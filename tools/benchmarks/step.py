"""Time, memory and FLOPs of one training step, against a loop over crops and unmasked crops."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.geometry import Cells, crop_cells
from model.hjepa import HJEPA
from model.losses import random_directions, view_loss
from model.masks import STRATEGIES, MaskPlan
from model.predictor import Predictor
from tools.benchmarks.measure import Step, median_times, peak_bytes, table, torch_device
from train.build import build_masks, build_model
from train.config.load import load_config

ENCODERS = {"small": "vit_small_patch16_dinov3", "tiny": "vit_tiny_patch16_dinov3_qkvb"}
CONFIG = Path(__file__).parents[2] / "configs" / "multicrop_training.yaml"
GLOBAL, LOCAL = 224, 96


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return `name`, `time_s`, `flops` and `peak_bytes` of one step of each kind."""
    device, encoder = torch_device(options.device), ENCODERS[options.model]
    torch.set_num_threads(1)
    steps = make_steps(encoder, options.batch, device)
    figures: dict[str, Mapping[str, float]] = {
        "time_s": median_times(steps, options.rounds, device),
        "flops": {name: count_flops(step) for name, step in steps.items()},
        "peak_bytes": {name: peak_bytes(step, device) for name, step in steps.items()},
    }
    cells = [
        [name, *(f"{each[name] * unit:,.1f}" for each, unit in zip(figures.values(), (1e3, 1e-9, 1e-6), strict=True)),
         *(f"{each[name] / each['naive']:.3f}" for each in figures.values())] for name in steps
    ]  # fmt: skip
    where = "GPU, bfloat16" if device.type == "cuda" else "CPU, float32, one thread"
    print(f"{encoder}, {options.batch} images, {where}")
    print(table(["row", "ms", "GFLOP", "peak MB", "time/naive", "FLOPs/naive", "peak/naive"], cells))
    return [{"name": name, **{key: each[name] for key, each in figures.items()}} for name in steps]


def count_flops(step: Step) -> int:
    """Return the FLOPs of a step, attention included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def make_steps(encoder: str, batch: int, device: torch.device) -> dict[str, Step]:
    """Return what each row runs: forward, backward and target update on the same images and weights."""
    configs = {name: load_config(CONFIG, [f"model.encoder={encoder}", f"masking.strategy={name}"]) for name in STRATEGIES}
    model = build_model(configs["global_only"], device)
    masks = {name: build_masks(config, model, device) for name, config in configs.items()}
    all_crops, plan = draw_batch(batch, 6, device), masks["global_only"](batch)
    steps: dict[str, Step] = {
        f"ours/{name}": partial(take_step, model, all_crops, generator(batch)) for name, generator in masks.items()
    }
    steps["naive"] = partial(take_step, model, all_crops, plan, naive_losses)
    steps["unmasked-2"] = partial(take_step, model, draw_batch(batch, 0, device), unmasked(plan))
    return steps


def draw_batch(batch: int, num_local: int, device: torch.device) -> dict[str, Any]:
    """Return random inputs of `HJEPA.forward`, drawn on the CPU so that they are the same on every device."""
    torch.manual_seed(1)
    sizes = [GLOBAL, GLOBAL] + [LOCAL] * num_local
    corners = torch.rand(batch, len(sizes), 2, 2).sort(dim=2).values
    return {
        "crops": [torch.randn(batch, 3, size, size).to(device) for size in sizes],
        "boxes": torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.05], dim=-1).to(device),
        "flips": (torch.rand(batch, len(sizes)) < 0.5).to(device),
        "directions": random_directions(256, 256, torch.Generator().manual_seed(0), torch.device("cpu")).to(device),
    }


def unmasked(plan: MaskPlan) -> MaskPlan:
    """Return the same queries with every token of the globals encoded and seen."""
    (images, num_global), tokens = plan.context.shape[:2], (GLOBAL // 16) ** 2
    context = torch.arange(tokens, device=plan.context.device).expand(images, num_global, -1)
    sources = torch.arange(num_global * tokens, device=plan.context.device).view(1, num_global, -1)
    return MaskPlan(context, plan.queries, sources.expand(images, -1, -1))


def take_step(
    model: HJEPA, batch: dict[str, Any], plan: MaskPlan, losses: Callable[..., dict[str, Tensor]] = HJEPA.__call__
) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=plan.context.is_cuda):
        total = losses(model, **batch, plan=plan)["loss"]
    total.backward()
    model.zero_grad(set_to_none=True)
    model.update_target(0.99)


def naive_losses(
    model: HJEPA, crops: Sequence[Tensor], boxes: Tensor, flips: Tensor, plan: MaskPlan, directions: Tensor
) -> dict[str, Tensor]:
    """Return the loss of one forward pass of student, target and predictor per crop; masked tokens are zeroed, not dropped.

    The predictor sees all tokens of a crop. It predicts the plan's cells of a global and all cells of a local, which has no
    mask; its blocks are timm's own. Levels, view term and SIGReg are those of `HJEPA.forward`.
    """
    assert model.predictor is not None
    assert model.projector is not None
    total, summaries, size = torch.zeros((), device=boxes.device), [], model.encoder.patch_size
    for view, pixels in enumerate(crops):
        grid, place = pixels.shape[-1] // size, (boxes[:, view], flips[:, view])
        # Student: the crop at full length, with the masked patches set to zero.
        seen = pixels
        if view < model.num_global:
            mask = torch.zeros(len(boxes), grid * grid, device=boxes.device).scatter_(1, plan.context[:, view], 1.0)
            seen = pixels * F.interpolate(mask.view(-1, 1, grid, grid), scale_factor=size)
        tokens = model.encoder([(seen, None)])[0].tokens
        summaries.append(tokens.float().mean(dim=1))
        # Target: a forward pass of its own for each crop.
        goals, queries = model._targets(pixels)[0], []
        for rung, level in enumerate(model.levels):
            cells = plan.queries[rung][:, view] if view < model.num_global else None
            queries.append(crop_cells(*place, grid, level.stride, cells))
            if cells is not None:
                goals[rung] = torch.take_along_dim(goals[rung], cells[..., None], dim=1)
        # Prediction: all tokens and queries go through every block.
        predictions = predict_cells(model.predictor, tokens, [crop_cells(*place, grid), *queries])
        for level, predicted, goal in zip(model.levels, predictions, goals, strict=True):
            total = total + level.weight * F.smooth_l1_loss(predicted.float(), goal) / len(crops)
    # View term and SIGReg, over all crops at once, as in the product.
    projections = model.projector(torch.cat(summaries)).float().unflatten(0, (len(crops), -1)).transpose(0, 1)
    total = total + model.weights.view * view_loss(projections, model.num_global)
    return {"loss": total + model.weights.sigreg * model.sigreg(projections, directions)}


def predict_cells(predictor: Predictor, tokens: Tensor, cells: Sequence[Cells]) -> list[Tensor]:
    """Return `Predictor.forward` of all `tokens` of one crop, in the first of `cells`, with all blocks applied to all rows."""
    entered = predictor.enter(tokens)
    starts = [entered, *predictor.query.to(entered.dtype)]
    rows = [start + predictor.size_embed(each.log_sizes) for start, each in zip(starts, cells, strict=True)]
    x, rope = torch.cat(rows, dim=1), predictor._rope(torch.cat([each.centres for each in cells], dim=1))
    for block in predictor.blocks:
        x = block(x, rope=rope)
    parts = predictor.norm(x).split([row.shape[1] for row in rows], dim=1)[1:]
    return [head(part) for head, part in zip(predictor.heads, parts, strict=True)]
