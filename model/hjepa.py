"""The whole step as one module: crops in, named losses out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from model import defaults
from model.encoder import MultiCropEncoder
from model.geometry import cell_centres, covered, log_cell_size
from model.losses import BatchStandardize, LossWeights, SIGReg, prediction_losses, view_loss, weighted_sum
from model.masks import MaskPlan, level_grid, pool_cells
from model.predictor import Predictor
from model.summary import SummaryPredictor, summary_loss
from model.teacher import TaughtEncoder


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


class HJEPA(TaughtEncoder):
    """Student encoder, EMA target encoder, predictor and projector; `forward` is the whole loss.

    `predictor` has a head for each of the `levels`; None trains without it.
    """

    def __init__(
        self,
        encoder: MultiCropEncoder,
        predictor: Predictor | None,
        levels: Sequence[Level],
        *,
        num_global_crops: int,
        global_crop_size: int,
        projector_hidden: int,
        projector_dim: int,
        sigreg_knots: int,
        weights: LossWeights,
        exclude_covered: bool = defaults.EXCLUDE_COVERED,
        grad_checkpointing: bool = defaults.GRAD_CHECKPOINTING,
    ) -> None:
        super().__init__(encoder)
        self.levels = tuple(levels)
        self.level_weights = [level.weight for level in levels]
        self.num_global, self.grid = num_global_crops, global_crop_size // encoder.patch_size
        self.predictor = predictor
        self.encoder.grad_checkpointing = grad_checkpointing
        if predictor is not None:
            predictor.grad_checkpointing = grad_checkpointing
        self.projector: nn.Module | None = None
        self.exclude_covered = exclude_covered
        self.weights = weights
        if weights.view > 0 or weights.sigreg > 0:
            self.projector = nn.Sequential(
                nn.Linear(encoder.width, projector_hidden),
                BatchStandardize(projector_hidden),
                nn.GELU(),
                nn.Linear(projector_hidden, projector_dim),
            )
        self.sigreg = SIGReg(sigreg_knots)
        self.summary: SummaryPredictor | None = None
        if weights.summary > 0:
            cells = [level_grid(self.grid, level.stride) ** 2 for level in levels]
            self.summary = SummaryPredictor(encoder.width, cells)

    def forward(
        self, crops: Sequence[torch.Tensor], boxes: torch.Tensor, flips: torch.Tensor, plan: MaskPlan,
        directions: torch.Tensor,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The losses of one batch, scalars in float32: `loss`, `level_0` .., `summary`, `view`, `sigreg`, and no_grad `features`.

        Terms of weight 0 are left out.

        Where the predictor sees other crops of the image, its partners, three more are reported: `covered_share`, the share of
        the queried cells whose centre lies in a partner's box, and `inside` and `outside`, the weighted sum of the levels over
        these cells and over the others. With `exclude_covered` the loss is over the others alone.

        `crops`: V tensors `[B, 3, S, S]`, globals first, uint8 or already normalised, as in `MultiCropEncoder`.
        `boxes`: `[B, V, 4]`, `flips`: `[B, V]`, as in `CropBatch`. `directions`: `[P, S]` of `random_directions`.
        `features`: `[B, D]`, pooled target features of the first global; without predictions, the student's of what it sees.
        """
        whole = join_crops(crops[: self.num_global])
        groups = [(whole, self._kept(plan))]
        # Without a view term and without partners nothing would come of the locals.
        if len(crops) > self.num_global and (self.projector is not None or plan.partners is not None):
            groups.append((join_crops(crops[self.num_global :]), None))
        student = [out.tokens for out in self.encoder(groups)]
        losses: dict[str, torch.Tensor] = {}
        terms: list[torch.Tensor] = []
        views = pool_views(student, len(boxes))
        if self.predictor is not None or self.summary is not None:
            targets, pooled = self._targets(whole)
            losses["features"] = pooled.unflatten(0, (len(boxes), -1))[:, 0]
        if self.predictor is not None:
            losses |= self._level_losses(self.predictor, student, targets, boxes, flips, plan)
            levels = weighted_sum(self.level_weights, [losses[f"level_{rung}"] for rung in range(len(self.levels))])
            terms.append(self.weights.prediction * levels)
        if self.summary is not None:
            losses["summary"] = summary_loss(
                self.summary(views[:, : self.num_global].flatten(0, 1)), targets, self.level_weights
            )
            terms.append(self.weights.summary * losses["summary"])
        if self.projector is not None:
            projections = self.projector(views.flatten(0, 1)).float().unflatten(0, views.shape[:2])
            losses["view"] = view_loss(projections, self.num_global)
            losses["sigreg"] = self.sigreg(projections, directions)
            terms += [self.weights.view * losses["view"], self.weights.sigreg * losses["sigreg"]]
            losses.setdefault("features", views[:, 0].detach())
        losses["loss"] = sum(terms[1:], terms[0])
        return losses

    def _kept(self, plan: MaskPlan) -> torch.Tensor | None:
        """The tokens of each global that the student encodes, `[B * G, K]`; None for all: gathering them would cost time."""
        return None if plan.context.shape[-1] == self.grid**2 else plan.context.flatten(0, 1)

    def _level_losses(
        self,
        predictor: Predictor,
        student: list[torch.Tensor],
        targets: list[torch.Tensor],
        boxes: torch.Tensor,
        flips: torch.Tensor,
        plan: MaskPlan,
    ) -> dict[str, torch.Tensor]:
        """`prediction_losses` of the smooth L1 distance of each queried cell, `[B * G, M_l] float32` per level."""
        places = self._query_places(boxes, flips, plan)
        predictions = self._predict(predictor, student, places, boxes, flips, plan)
        errors = []
        for prediction, target, queries in zip(predictions, targets, plan.queries, strict=True):
            wanted = _pick(target, queries.flatten(0, 1))
            errors.append(F.smooth_l1_loss(prediction.float(), wanted, reduction="none").mean(dim=-1))
        return prediction_losses(errors, self.level_weights, _inside(places, boxes, plan), self.exclude_covered)

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

    def _query_places(self, boxes: torch.Tensor, flips: torch.Tensor, plan: MaskPlan) -> list[torch.Tensor]:
        """Per level `[B * G, M_l, 2]`: the centres of the queried cells, in the source image."""
        box, flip = boxes[:, : self.num_global].flatten(0, 1), flips[:, : self.num_global].flatten(0, 1)
        return [
            _pick(cell_centres(box, flip, self.grid, level.stride), queries.flatten(0, 1))
            for level, queries in zip(self.levels, plan.queries, strict=True)
        ]

    def _predict(
        self,
        predictor: Predictor,
        student: list[torch.Tensor],
        query_places: list[torch.Tensor],
        boxes: torch.Tensor,
        flips: torch.Tensor,
        plan: MaskPlan,
    ) -> list[torch.Tensor]:
        """Put the student's tokens of an image, globals first, in one row with their places, and ask the predictor."""
        if plan.partners is None:
            student = student[:1]  # no source names a local
        tokens, places, sizes = [], [], []
        ends = (self.num_global, boxes.shape[1])
        for group, (part, end) in enumerate(zip(student, ends, strict=False)):
            box, flip = (value[:, end - len(part) // len(boxes) : end].flatten(0, 1) for value in (boxes, flips))
            grid = self.grid if group == 0 else math.isqrt(part.shape[1])
            centres = cell_centres(box, flip, grid)
            place = _pick(centres, plan.context.flatten(0, 1)) if group == 0 else centres
            tokens.append(part.reshape(len(boxes), -1, part.shape[-1]))
            places.append(place.reshape(len(boxes), -1, 2))
            sizes.append(_spread(log_cell_size(box, grid), part.shape[1]).reshape(len(boxes), -1, 2))
        query_sizes = [
            _spread(log_cell_size(boxes[:, : self.num_global].flatten(0, 1), self.grid, level.stride), place.shape[1])
            for level, place in zip(self.levels, query_places, strict=True)
        ]
        rows = [torch.cat(parts, dim=1) for parts in (tokens, places, sizes)]
        return predictor(*rows, plan.sources, plan.real, query_places, query_sizes)


def join_crops(crops: Sequence[torch.Tensor]) -> torch.Tensor:
    """V tensors `[B, 3, S, S]` -> `[B * V, 3, S, S]`, image by image, channels last in memory."""
    return torch.stack([crop.permute(0, 2, 3, 1) for crop in crops], dim=1).flatten(0, 1).permute(0, 3, 1, 2)


def pool_views(groups: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Groups of encoded crops of `count` images, each `[count * v, K, D]` -> their mean tokens, `[count, V, D] float32`."""
    return torch.cat([tokens.float().mean(dim=1).unflatten(0, (count, -1)) for tokens in groups], dim=1)


def _inside(places: list[torch.Tensor], boxes: torch.Tensor, plan: MaskPlan) -> list[torch.Tensor] | None:
    """Per level `[B * G, M_l] bool`: whether a partner's box holds the place; None without partners."""
    if plan.partners is None:
        return None
    shape = plan.partners.shape[:2]
    return [covered(place.unflatten(0, shape), boxes, plan.partners).flatten(0, 1) for place in places]


def _pick(rows: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, cells[..., None].expand(-1, -1, rows.shape[-1]))


def _spread(values: torch.Tensor, count: int) -> torch.Tensor:
    return values[:, None].expand(-1, count, -1)
