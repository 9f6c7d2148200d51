"""The training step as a plain loop over crops: the reference that `bench.py step` compares with."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from model.geometry import cell_centres, log_cell_size
from model.hjepa import HJEPA
from model.losses import view_loss
from model.masks import MaskPlan, pool_cells
from model.predictor import Predictor


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
        seen = torch.ones(len(boxes), grid * grid, 1, device=device)
        if is_global:
            seen = torch.zeros_like(seen).scatter_(1, plan.context[:, view, :, None], 1.0)
        tokens = model.encoder([(zero_unseen(pixels, seen, grid), None)])[0].tokens
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


def zero_unseen(pixels: torch.Tensor, seen: torch.Tensor, grid: int) -> torch.Tensor:
    """Return the crop with the patches of unseen tokens set to zero."""
    mask = seen.view(len(pixels), 1, grid, grid)
    return pixels * F.interpolate(mask, size=pixels.shape[-1], mode="nearest")
