"""The whole step as one module: crops in, named losses out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from model.geometry import cell_centres, log_cell_size
from model.losses import BatchStandardize, SIGReg, view_loss
from model.masks import MaskPlan, pool_cells
from model.predictor import Predictor


@dataclass(frozen=True)
class Level:
    """One rung of the hierarchy: the map after block `layer` (from 0), averaged over `stride x stride` tokens."""

    layer: int
    stride: int
    weight: float


def default_levels(depth: int) -> tuple[Level, ...]:
    """Three levels for an encoder of any depth: the last block's tokens, and coarser maps of earlier blocks."""
    layers = [depth - 1, max(round(depth * 2 / 3) - 1, 0), max(round(depth / 3) - 1, 0)]
    return tuple(Level(layer, 2**rung, 0.5**rung) for rung, layer in enumerate(layers))


class HJEPA(nn.Module):
    """Student encoder, EMA target encoder, predictor and projector; `forward` is the whole loss.

    The target encoder's parameters need no gradient and are moved by `update_target`.
    """

    def __init__(
        self,
        encoder: MultiCropEncoder,
        levels: Sequence[Level],
        *,
        num_global_crops: int,
        global_crop_size: int,
        predictor_width: int,
        predictor_depth: int,
        predictor_heads: int,
        projector_hidden: int,
        projector_dim: int,
        view_weight: float,
        sigreg_weight: float,
        sigreg_knots: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.target = copy.deepcopy(encoder).requires_grad_(False)
        self.levels = tuple(levels)
        self.num_global, self.grid = num_global_crops, global_crop_size // encoder.patch_size
        self.predictor = Predictor(encoder.width, predictor_width, predictor_depth, predictor_heads, len(self.levels))
        self.projector: nn.Module | None = None
        self.view_weight, self.sigreg_weight = view_weight, sigreg_weight
        if view_weight > 0 or sigreg_weight > 0:
            self.projector = nn.Sequential(
                nn.Linear(encoder.width, projector_hidden),
                BatchStandardize(projector_hidden),
                nn.GELU(),
                nn.Linear(projector_hidden, projector_dim),
            )
        self.sigreg = SIGReg(sigreg_knots)

    def forward(
        self,
        crops: Sequence[torch.Tensor],
        boxes: torch.Tensor,
        flips: torch.Tensor,
        plan: MaskPlan,
        directions: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The losses of one batch, scalars in float32: `loss`, `level_0` .., `view`, `sigreg`, and no_grad `features`.

        `crops`: V tensors `[B, 3, S, S]`, globals first. `boxes`: `[B, V, 4]`, `flips`: `[B, V]`, as in `CropBatch`.
        `directions`: `[P, S]` of `random_directions`. `features`: `[B, D]`, pooled target features of the first global.
        """
        whole = torch.stack(list(crops[: self.num_global]), dim=1).flatten(0, 1)  # [B * G, 3, S, S]
        keep = plan.context.flatten(0, 1)
        groups: list[tuple[torch.Tensor, torch.Tensor | None]] = [(whole, keep)]
        local = list(crops[self.num_global :])
        if local:
            groups.append((torch.stack(local, dim=1).flatten(0, 1), None))
        student = self.encoder(groups)
        targets, pooled = self._targets(whole)
        box, flip = boxes[:, : self.num_global].flatten(0, 1), flips[:, : self.num_global].flatten(0, 1)
        predictions = self._predict(student[0].tokens, keep, box, flip, plan)
        losses = {}
        for rung, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            cells = plan.queries[rung].flatten(0, 1)
            wanted = target.gather(1, cells[..., None].expand(-1, -1, target.shape[-1]))
            losses[f"level_{rung}"] = F.smooth_l1_loss(prediction.float(), wanted)
        weighted = [level.weight * losses[f"level_{rung}"] for rung, level in enumerate(self.levels)]
        total = torch.stack(weighted).sum()
        if self.projector is not None:
            summaries = [out.tokens.float().mean(dim=1).unflatten(0, (len(boxes), -1)) for out in student]
            flat = torch.cat(summaries, dim=1)
            projections = self.projector(flat.flatten(0, 1)).float().unflatten(0, flat.shape[:2])
            losses["view"] = view_loss(projections, self.num_global)
            losses["sigreg"] = self.sigreg(projections, directions)
            total = total + self.view_weight * losses["view"] + self.sigreg_weight * losses["sigreg"]
        losses["loss"] = total
        losses["features"] = pooled.unflatten(0, (len(boxes), -1))[:, 0]
        return losses

    @torch.no_grad()
    def _targets(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Per level the target map `[n, cells, D] float32`, layer-normed then pooled; and the mean final token `[n, D]`."""
        (out,) = self.target([(whole, None)], layers=[level.layer for level in self.levels])
        maps = []
        for level, tokens in zip(self.levels, out.layers, strict=True):
            normed = F.layer_norm(tokens.float(), tokens.shape[-1:])
            grid = normed.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            maps.append(pool_cells(grid, level.stride).flatten(2).transpose(1, 2))
        return maps, out.tokens.float().mean(dim=1)

    def _predict(
        self, context: torch.Tensor, keep: torch.Tensor, box: torch.Tensor, flip: torch.Tensor, plan: MaskPlan
    ) -> list[torch.Tensor]:
        query_places, query_sizes = [], []
        for rung, level in enumerate(self.levels):
            cells = plan.queries[rung].flatten(0, 1)
            query_places.append(_pick(cell_centres(box, flip, self.grid, level.stride), cells))
            query_sizes.append(_spread(log_cell_size(box, self.grid, level.stride), cells))
        places = _pick(cell_centres(box, flip, self.grid), keep)
        return self.predictor(context, places, _spread(log_cell_size(box, self.grid), keep), query_places, query_sizes)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder towards the student: target = momentum * target + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1 - momentum)


def _pick(places: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return places.gather(1, cells[..., None].expand(-1, -1, places.shape[-1]))


def _spread(values: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return values[:, None].expand(-1, cells.shape[1], -1)
