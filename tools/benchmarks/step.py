"""Time, memory and FLOPs of one training step, against a loop over crops and unmasked crops."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.geometry import cell_centres, log_cell_size
from model.hjepa import HJEPA
from model.losses import random_directions, view_loss
from model.masks import STRATEGIES, MaskPlan, pool_cells
from model.predictor import Predictor
from tools.benchmarks.measure import Step, median_times, peak_bytes, table
from train.build import build_masks, build_model
from train.config.load import load_config

ENCODERS = {"small": "vit_small_patch16_dinov3", "tiny": "vit_tiny_patch16_dinov3_qkvb"}
CONFIG = Path(__file__).parents[2] / "configs" / "multicrop_training.yaml"
GLOBAL, LOCAL = 224, 96


def run_benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.device == "gpu" and not torch.cuda.is_available():
        raise ValueError("--device gpu: torch sees no CUDA GPU; write cpu or auto")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    encoder = ENCODERS[options.model]
    rows = measure_rows(encoder, options.batch, options.rounds, device)
    where = "GPU, bfloat16" if device.type == "cuda" else "CPU, float32, one thread"
    print(f"{encoder}, {options.batch} images, {where}")
    print_rows({row["name"]: row for row in rows})
    return rows


def measure_rows(encoder: str, batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return `name`, `time_s`, `peak_bytes` and `flops` of one step of each kind."""
    steps = make_steps(encoder, batch, device)
    times = median_times(steps, rounds, device)
    return [
        {"name": name, "time_s": times[name], "flops": count_flops(step), "peak_bytes": peak_bytes(step, device)}
        for name, step in steps.items()
    ]


def count_flops(step: Step) -> int:
    """Return the FLOPs of a step, attention included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    units = {"time_s": 1e3, "flops": 1e-9, "peak_bytes": 1e-6}
    cells = []
    for name, row in rows.items():
        ratios = (f"{row[key] / rows['naive'][key]:.3f}" for key in units)
        cells.append([name, *(f"{row[key] * unit:,.1f}" for key, unit in units.items()), *ratios])
    print(table(["row", "ms", "GFLOP", "peak MB", "time/naive", "FLOPs/naive", "peak/naive"], cells))


def make_steps(encoder: str, batch: int, device: torch.device) -> dict[str, Step]:
    """Return what each row runs: forward, backward and target update on the same images and weights."""
    configs = {name: load_config(CONFIG, [f"model.encoder={encoder}", f"masking.strategy={name}"]) for name in STRATEGIES}
    model = build_model(configs["global_only"], device)
    masks = {name: build_masks(config, model, device) for name, config in configs.items()}
    all_crops, plan = draw_batch(batch, 6, device), masks["global_only"](batch)
    steps = {f"ours/{name}": make_step(model, all_crops, generator(batch)) for name, generator in masks.items()}
    steps["naive"] = make_step(model, all_crops, plan, naive_losses)
    steps["unmasked-2"] = make_step(model, draw_batch(batch, 0, device), unmasked(plan))
    return steps


def draw_batch(batch: int, num_local: int, device: torch.device) -> dict[str, Any]:
    """Return random inputs of `HJEPA.forward`, drawn on the CPU so that they are the same on every device."""
    torch.manual_seed(1)
    sizes = [GLOBAL, GLOBAL] + [LOCAL] * num_local
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


def naive_losses(
    model: HJEPA,
    crops: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    flips: torch.Tensor,
    plan: MaskPlan,
    directions: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return the loss of one forward pass of student, target and predictor per crop; masked tokens are zeroed, not dropped.

    The predictor sees all tokens of a crop. It predicts the plan's cells of a global and all cells of a local, which has no
    mask; its blocks are timm's own. Levels, view term and SIGReg are those of `HJEPA.forward`.
    """
    predictor, device = model.predictor, boxes.device
    assert predictor is not None, "the plain loop needs a predictor"
    total, summaries = torch.zeros((), device=device), []
    for view, pixels in enumerate(crops):
        grid = pixels.shape[-1] // model.encoder.patch_size
        box, flip, is_global = boxes[:, view], flips[:, view], view < model.num_global
        # Student: the crop at full length, with the masked patches set to zero.
        seen = torch.ones(len(boxes), grid * grid, device=device)
        if is_global:
            seen = torch.zeros_like(seen).scatter_(1, plan.context[:, view], 1.0)
        mask = F.interpolate(seen.view(-1, 1, grid, grid), size=pixels.shape[-1], mode="nearest")
        tokens = model.encoder([(pixels * mask, None)])[0].tokens
        summaries.append(tokens.float().mean(dim=1))
        # Target: a forward pass of its own for each crop, pooled to the cells of each level.
        with torch.no_grad():
            (out,) = model.target([(pixels, None)], layers=[level.layer for level in model.levels])
        places, sizes, targets = [], [], []
        for rung, (level, layer) in enumerate(zip(model.levels, out.layers, strict=True)):
            dense = F.layer_norm(layer.float(), layer.shape[-1:]).transpose(1, 2).unflatten(2, (grid, grid))
            goal = pool_cells(dense, level.stride).flatten(2).transpose(1, 2)
            every = torch.arange(goal.shape[1], device=device).expand(len(boxes), -1)
            cells = (plan.queries[rung][:, view] if is_global else every)[..., None]
            places.append(cell_centres(box, flip, grid, level.stride).gather(1, cells.expand(-1, -1, 2)))
            sizes.append(log_cell_size(box, grid, level.stride)[:, None].expand(-1, cells.shape[1], -1))
            targets.append(goal.gather(1, cells.expand(-1, -1, goal.shape[-1])))
        # Prediction: all tokens and queries go through every block.
        token_sizes = log_cell_size(box, grid)[:, None].expand(-1, grid * grid, -1)
        predictions = predict_cells(predictor, tokens, cell_centres(box, flip, grid), token_sizes, places, sizes)
        for level, predicted, goal in zip(model.levels, predictions, targets, strict=True):
            total = total + level.weight * F.smooth_l1_loss(predicted.float(), goal) / len(crops)
    # View term and SIGReg, over all crops at once, as in the product.
    if model.projector is not None:
        flat = torch.stack(summaries, dim=1)
        projections = model.projector(flat.flatten(0, 1)).float().unflatten(0, flat.shape[:2])
        total = total + model.weights.view * view_loss(projections, model.num_global)
        total = total + model.weights.sigreg * model.sigreg(projections, directions)
    return {"loss": total}


def predict_cells(
    predictor: Predictor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    token_sizes: torch.Tensor,
    query_places: list[torch.Tensor],
    query_sizes: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Return `Predictor.forward` of one crop from all its tokens, with every block applied to every token."""
    rows = [predictor.enter(tokens) + predictor.size_embed(token_sizes)]
    queries = predictor.query.to(rows[0].dtype)
    rows += [query + predictor.size_embed(size) for query, size in zip(queries, query_sizes, strict=True)]
    x, rope = torch.cat(rows, dim=1), predictor._rope(torch.cat([places, *query_places], dim=1))
    for block in predictor.blocks:
        x = block(x, rope=rope)
    parts = predictor.norm(x).split([row.shape[1] for row in rows], dim=1)[1:]
    return [head(part) for head, part in zip(predictor.heads, parts, strict=True)]
