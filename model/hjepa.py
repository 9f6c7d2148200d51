"""The complete method as one module: crops in, named losses out. Start to read here."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import defaults
from model.encoder import MultiCropEncoder
from model.geometry import Cells, crop_cells
from model.losses import BatchStandardize, LossWeights, SIGReg, Whiten, anchor_loss, colour_shares, view_loss, weighted_sum
from model.masks import MaskPlan, level_grid, pool_cells
from model.predictor import Predictor, SummaryPredictor, summary_loss
from model.teacher import StudentTeacher


class Level(NamedTuple):
    """One rung of the hierarchy: the map after block `layer` (from 0), averaged over `stride x stride` tokens."""

    layer: int
    stride: int
    weight: float


def default_levels(depth: int) -> tuple[Level, ...]:
    """Return three levels for an encoder of any depth: the last block's tokens and coarser maps of earlier blocks."""
    layers = [depth - 1, max(round(depth * 2 / 3) - 1, 0), max(round(depth / 3) - 1, 0)]
    return tuple(Level(layer, 2**rung, 0.5**rung) for rung, layer in enumerate(layers))


class HJEPA(StudentTeacher):
    """Student encoder, EMA target encoder, predictors and projector; `forward` returns the loss.

    loss = weights.prediction * sum_l w_l level_l + weights.summary * summary + weights.view * view + weights.sigreg * sigreg +
    weights.colour * colour, with the equations of docs/method.md. `predictor` has one head per level; None trains without it.
    `whiten_targets`: targets are whitened over the batch instead of layer-normed.
    """

    def __init__(
        self, encoder: MultiCropEncoder, predictor: Predictor | None, levels: Sequence[Level], *,
        num_global_crops: int, global_crop_size: int, projector_hidden: int, projector_dim: int, weights: LossWeights,
        grad_checkpointing: bool = defaults.GRAD_CHECKPOINTING, whiten_targets: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(encoder)
        self.levels = tuple(levels)
        self.level_weights = [level.weight for level in levels]
        self.num_global, self.grid = num_global_crops, global_crop_size // encoder.patch_size
        self.weights, self.predictor = weights, predictor
        layer_norm = nn.LayerNorm(encoder.width, elementwise_affine=False)
        self.norms = nn.ModuleList([Whiten() if whiten_targets else layer_norm for _ in levels])
        self.encoder.grad_checkpointing = grad_checkpointing
        if predictor is not None:
            predictor.grad_checkpointing = grad_checkpointing
        self.projector: nn.Module | None = None
        if weights.view > 0 or weights.sigreg > 0:
            hidden = (nn.Linear(encoder.width, projector_hidden), BatchStandardize(projector_hidden), nn.GELU())
            self.projector = nn.Sequential(*hidden, nn.Linear(projector_hidden, projector_dim))
        # The encoder at its starting weights, for the anchor; in a tuple, which keeps it out of the state dict.
        self.start: tuple[MultiCropEncoder, ...] = ()
        self.sigreg = SIGReg()
        self.colour = nn.Linear(encoder.width, defaults.COLOURS) if weights.colour > 0 else None
        self.summary: SummaryPredictor | None = None
        if weights.summary > 0:
            cells = [level_grid(self.grid, level.stride) ** 2 for level in levels]
            self.summary = SummaryPredictor(encoder.width, cells)

    def forward(
        self, crops: Sequence[Tensor], boxes: Tensor, flips: Tensor, plan: MaskPlan, directions: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of one batch, float32 scalars: `loss`, its unweighted terms, and without gradient `features`.

        `crops`: V tensors `[B, 3, S, S]`, globals first, uint8 or normalised, as in `MultiCropEncoder`. `boxes`: `[B, V, 4]` and
        `flips`: `[B, V]`, as in `CropBatch`. `directions`: `[P, S]`, from `random_directions`.

        `features`: `[B, D]`, the target's mean token of the first global; without predictions, the student's. The terms
        `level_0` .., `summary`, `view`, `sigreg` and `colour`, which needs uint8 crops, are absent if their weight is 0.
        """
        losses: dict[str, Tensor] = {}
        # 1. Student: one packed pass over the context of the globals and, if a term below uses them, all tokens of the locals.
        groups = self._student_groups(crops, plan)
        student = [output.tokens for output in self.encoder(groups)]
        views = pool_views(student, len(boxes))
        # 2. Teacher: the EMA encoder sees the complete globals, without gradient; its maps are what is predicted.
        if self.predictor is not None or self.summary is not None:
            targets, pooled = self._targets(groups[0][0])
            losses["features"] = pooled.unflatten(0, (len(boxes), -1))[:, 0]
        # 3. Prediction of the queried cells of every level, from the context tokens and the positions in the source image.
        if self.predictor is not None:
            levels = self._level_losses(student, targets, boxes, flips, plan)
            losses |= {f"level_{rung}": level for rung, level in enumerate(levels)}
            losses["loss"] = self.weights.prediction * weighted_sum(self.level_weights, levels)
        # 4. Prediction of all cells of every level from the mean context token only.
        if self.summary is not None:
            maps = self.summary(views[:, : self.num_global].flatten(0, 1))
            losses["summary"] = summary_loss(maps, targets, self.level_weights)
        # 5. View invariance, which by itself collapses, and SIGReg, which prevents that by keeping projections Gaussian.
        if self.projector is not None:
            projections = self.projector(views.flatten(0, 1)).float().unflatten(0, views.shape[:2])
            losses["view"] = view_loss(projections, self.num_global)
            losses["sigreg"] = self.sigreg(projections, directions)
            losses.setdefault("features", views[:, 0].detach())
        # 6. Prediction of the colours of every crop from its mean token, which would otherwise lose them.
        if self.colour is not None:
            shares = torch.cat([colour_shares(group[0]).unflatten(0, (len(boxes), -1)) for group in groups], dim=1)
            losses["colour"] = F.cross_entropy(self.colour(views).flatten(0, 1), shares.flatten(0, 1))
        # 7. Anchor: the student's tokens stay close to those of the starting weights for the same input.
        for start in self.start:
            with torch.no_grad():
                (before,) = start(groups[:1])
            losses["anchor"] = anchor_loss(student[0], before.tokens)
        for name in ("summary", "view", "sigreg", "anchor", "colour"):
            if name in losses:
                losses["loss"] = getattr(self.weights, name) * losses[name] + losses.get("loss", 0)
        return losses

    @torch.no_grad()
    def _targets(self, crops: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return per level the target map `[n, cells, D] float32`, and the mean final token `[n, D]`, of crops of any one size.

        A map is layer-normalised or whitened, so that no level dominates by its scale, and then averaged over its cells.
        """
        (output,) = self.target([(crops, None)], layers=[level.layer for level in self.levels])
        maps = []
        for level, norm, tokens in zip(self.levels, self.norms, output.layers, strict=True):
            grid = norm(tokens.float()).transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
            maps.append(pool_cells(grid, level.stride).flatten(2).transpose(1, 2))
        return maps, output.tokens.float().mean(dim=1)

    def _student_groups(self, crops: Sequence[Tensor], plan: MaskPlan) -> list[tuple[Tensor, Tensor | None]]:
        """Return what the student encodes: the globals with the tokens to keep (None: all), and the locals if they are used."""
        context = plan.context.flatten(0, 1)
        kept = None if context.shape[1] == self.grid**2 else context  # keeping all needs no gather
        groups = [(join_crops(crops[: self.num_global]), kept)]
        if len(crops) > self.num_global and (self.projector is not None or plan.partners is not None):
            groups.append((join_crops(crops[self.num_global :]), None))
        return groups

    def _level_losses(
        self, student: list[Tensor], targets: list[Tensor], boxes: Tensor, flips: Tensor, plan: MaskPlan
    ) -> list[Tensor]:
        """Return per level the mean smooth L1 distance of the predictions of queried cells, `[] float32`."""
        assert self.predictor is not None
        queries = self._query_cells(boxes, flips, plan)
        predictions = self.predictor(*self._context(student, boxes, flips, plan), queries, plan.sources, plan.real)
        losses = []
        for prediction, target, chosen in zip(predictions, targets, plan.queries, strict=True):
            goal = torch.take_along_dim(target, chosen.flatten(0, 1)[..., None], dim=1)
            losses.append(F.smooth_l1_loss(prediction.float(), goal, reduction="none").mean(dim=-1).mean())
        return losses

    def _query_cells(self, boxes: Tensor, flips: Tensor, plan: MaskPlan) -> list[Cells]:
        """Return the queried cells of each level, `[B * G, M_l]`."""
        box, flip = boxes[:, : self.num_global].flatten(0, 1), flips[:, : self.num_global].flatten(0, 1)
        return [
            crop_cells(box, flip, self.grid, level.stride, chosen.flatten(0, 1))
            for level, chosen in zip(self.levels, plan.queries, strict=True)
        ]

    def _context(self, student: list[Tensor], boxes: Tensor, flips: Tensor, plan: MaskPlan) -> tuple[Tensor, Cells]:
        """Join the student's tokens of each image, globals first, as `plan.sources` counts them: `[B, S, D]` and their cells."""
        groups: list[tuple[Tensor, slice, int, Tensor | None]] = [
            (student[0], slice(self.num_global), self.grid, plan.context.flatten(0, 1))
        ]
        if plan.partners is not None and len(student) > 1:  # otherwise no source names a local
            groups.append((student[1], slice(self.num_global, None), math.isqrt(student[1].shape[1]), None))
        rows = []
        for tokens, crops, grid, chosen in groups:
            cells = crop_cells(boxes[:, crops].flatten(0, 1), flips[:, crops].flatten(0, 1), grid, chosen=chosen)
            parts = (tokens, cells.centres, cells.log_sizes)
            rows.append([part.reshape(len(boxes), -1, part.shape[-1]) for part in parts])
        features, centres, log_sizes = [torch.cat(parts, dim=1) for parts in zip(*rows, strict=True)]
        return features, Cells(centres, log_sizes)


def join_crops(crops: Sequence[Tensor]) -> Tensor:
    """Interleave V tensors `[B, 3, S, S]` image by image: `[B * V, 3, S, S]`, channels last in memory."""
    return torch.stack([crop.permute(0, 2, 3, 1) for crop in crops], dim=1).flatten(0, 1).permute(0, 3, 1, 2)


def pool_views(groups: Sequence[Tensor], batch_size: int) -> Tensor:
    """Return the mean token of every crop, `[B, V, D] float32`, from groups of tokens `[B * v, K, D]`."""
    return torch.cat([tokens.float().mean(dim=1).unflatten(0, (batch_size, -1)) for tokens in groups], dim=1)
