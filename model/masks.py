"""Draws which tokens of the globals the student sees, which cells are predicted, and from which tokens."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model import defaults

STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")
UNMASKED = "none"  # the strategy without prediction, which therefore masks nothing
ALLOWED = (*STRATEGIES, UNMASKED)


@dataclass(frozen=True)
class MaskPlan:
    """Token indices for B images with G global crops each, of V crops. Shapes are the same for every batch.

    `context`: `[B, G, K] int64`, ascending, the tokens that the student encodes. `queries`: per level `[B, G, M_l] int64`,
    ascending, the cells of that level's grid to predict. `context` and `queries[0]` never share a token if the first level has
    stride 1; coarser cells can contain visible tokens.

    `sources`: `[B, G, C] int64`, the tokens that the predictor sees to predict each global. They index the image's encoded
    tokens: K of each global, then all of each local. `real`: `[B, G, C] bool`, false for padding; None if there is none.
    `partners`: `[B, G, V] bool`, the other crops that a global's sources come from; None if there are none.
    """

    context: Tensor
    queries: tuple[Tensor, ...]
    sources: Tensor
    real: Tensor | None = None
    partners: Tensor | None = None

    def images(self, chosen: slice) -> "MaskPlan":
        """Return the plan of some of the images."""
        real, partners = (None if part is None else part[chosen] for part in (self.real, self.partners))
        queries = tuple(level[chosen] for level in self.queries)
        return MaskPlan(self.context[chosen], queries, self.sources[chosen], real, partners)


def level_grid(grid: int, stride: int) -> int:
    """Return the cells per side of a level; the last one is narrower if the stride does not divide the grid."""
    return math.ceil(grid / stride)


class MultiCropMaskGenerator:
    """Draw a `MaskPlan` on `device`, without a host sync: block masking after I-JEPA (arXiv 2301.08243, section 3).

    Each global crop gets `num_masks` rectangles with `mask_scale` of its area and an `aspect_ratio` (height / width) each; every
    placement that fits the grid is equally likely. Exactly `query_ratio` of the `grid x grid` tokens are queried, those inside
    the rectangles first, and exactly `context_ratio` are context, those outside first. Constant counts keep shapes static.

    The strategies differ in what the predictor sees to predict a global. `global_only`: the context of that global.
    `global_with_local_context`: also all tokens of all locals, which have `local_grid` tokens per side.
    `cross_crop_prediction`: only one other crop, each equally likely: all tokens of a local or the context of another global.
    `none`: nothing; every token is context, there are no queries, and nothing is drawn, so ratios and rectangles have no
    effect. Raises ValueError if the counts leave no context or no query, if a rectangle can be larger than the grid, or if the
    strategy needs more crops.
    """

    def __init__(
        self, masking_strategy: str, num_global_crops: int, num_local_crops: int, *,
        grid: int = 14, local_grid: int = 6, strides: tuple[int, ...] = (1, 2, 4), num_masks: int = defaults.NUM_MASKS,
        mask_scale: tuple[float, float] = defaults.MASK_SCALE, aspect_ratio: tuple[float, float] = defaults.ASPECT_RATIO,
        context_ratio: float = defaults.CONTEXT_RATIO, query_ratio: float = defaults.QUERY_RATIO,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if masking_strategy not in ALLOWED:
            raise ValueError(f"masking strategy {masking_strategy!r}: allowed are {', '.join(ALLOWED)}")
        second_crop, partners = {
            "global_with_local_context": (" and a local crop", num_local_crops),
            "cross_crop_prediction": (" and another crop", num_global_crops + num_local_crops - 1),
        }.get(masking_strategy, ("", 1))
        if num_global_crops < 1 or partners < 1:
            raise ValueError(
                f"{masking_strategy} with {num_global_crops} global and {num_local_crops} local crops: "
                f"it needs a global crop{second_crop}"
            )
        self.masking_strategy = masking_strategy
        self.num_global_crops, self.num_local_crops = num_global_crops, num_local_crops
        self.num_local_tokens, self.grid, self.strides, self.num_masks = local_grid**2, grid, strides, num_masks
        self.mask_scale, self.aspect_ratio, self.device = mask_scale, aspect_ratio, torch.device(device)
        tokens = grid * grid
        self.num_context, self.num_queries = round(context_ratio * tokens), round(query_ratio * tokens)
        if masking_strategy == UNMASKED:
            return
        if self.num_context < 1 or self.num_queries < 1 or self.num_context + self.num_queries > tokens:
            raise ValueError(
                f"masking of a {grid}x{grid} grid: {self.num_context} context and {self.num_queries} query tokens of {tokens}. "
                "Both must be at least 1 and fit together: change context_ratio, query_ratio or the crop size"
            )
        self._check_rectangles()
        self.level_queries = tuple(max(1, round(query_ratio * level_grid(grid, stride) ** 2)) for stride in strides)
        # The encoded tokens of an image in one row: each crop's count and first index.
        counts = [self.num_context] * num_global_crops + [self.num_local_tokens] * num_local_crops
        self.counts = torch.tensor(counts, device=self.device)
        self.starts = self.counts.cumsum(0) - self.counts

    def _check_rectangles(self) -> None:
        if self.num_masks < 1 or min(self.mask_scale) <= 0 or min(self.aspect_ratio) <= 0:
            raise ValueError(
                f"num_masks {self.num_masks}, mask_scale {self.mask_scale}, aspect_ratio {self.aspect_ratio}: all must be above 0"
            )
        area = max(self.mask_scale) * self.grid**2
        height, width = (area * max(self.aspect_ratio)) ** 0.5, (area / min(self.aspect_ratio)) ** 0.5
        if round(max(height, width)) > self.grid:
            raise ValueError(
                f"mask_scale up to {max(self.mask_scale)} at aspect_ratio {self.aspect_ratio} makes rectangles of up to "
                f"{height:.1f} x {width:.1f} tokens (height x width), larger than the {self.grid}x{self.grid} grid"
            )

    def __call__(self, batch_size: int, generator: Generator | None = None) -> MaskPlan:
        """Draw the plan of `batch_size` images. `generator` must live on the plan's device."""
        shape, tokens = (batch_size, self.num_global_crops), self.grid**2
        if self.masking_strategy == UNMASKED:
            every = torch.arange(tokens, device=self.device).expand(*shape, -1)
            return MaskPlan(every, (), every[..., :0])
        covered = self._rectangles(shape, generator).flatten(2)
        noise = torch.rand(*shape, tokens, device=self.device, generator=generator)
        # One ranking serves both: covered tokens in random order, then the others in random order. Queries are taken from
        # its top and context from its bottom, so they cannot overlap, however much the rectangles cover.
        ranking = torch.argsort(covered + noise, dim=-1, descending=True)
        queried, context = ranking[..., : self.num_queries], ranking[..., tokens - self.num_context :]
        # Coarse levels query the cells that contain most of the queried tokens, so all levels ask about the same region.
        queries = self._level_queries(torch.zeros(*shape, tokens, device=self.device).scatter_(-1, queried, 1.0), noise)
        return MaskPlan(context.sort(dim=-1).values, queries, *self._sources(batch_size, generator))

    def _rectangles(self, shape: tuple[int, int], generator: Generator | None) -> Tensor:
        """Draw the rectangles and return their union, `[B, G, grid, grid] float32`, 1 inside and 0 outside."""
        u = torch.rand(4, *shape, self.num_masks, device=self.device, generator=generator)
        # Area is uniform, the aspect ratio log-uniform: a ratio and its inverse are equally likely.
        low, high = (math.log(value) for value in self.aspect_ratio)
        area = (self.mask_scale[0] + (self.mask_scale[1] - self.mask_scale[0]) * u[0]) * self.grid**2
        aspect = torch.exp(low + (high - low) * u[1])
        height = (area * aspect).sqrt().round().clamp(1, self.grid)
        width = (area / aspect).sqrt().round().clamp(1, self.grid)
        top = (u[2] * (self.grid - height + 1)).floor()
        left = (u[3] * (self.grid - width + 1)).floor()
        # Compared with coordinates instead of filled in a loop: sizes and positions stay on the device.
        line = torch.arange(self.grid, device=self.device)
        rows = (line >= top[..., None]) & (line < (top + height)[..., None])
        columns = (line >= left[..., None]) & (line < (left + width)[..., None])
        return (rows[..., :, None] & columns[..., None, :]).any(dim=2).float()

    def _level_queries(self, queried: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Return per level the cells with the largest fraction of queried tokens; ties are broken at random."""
        maps = torch.stack([queried, noise], dim=2).unflatten(-1, (self.grid, self.grid)).flatten(0, 1)
        chosen = []
        for stride, count in zip(self.strides, self.level_queries, strict=True):
            share, tie = pool_cells(maps, stride).flatten(2).unbind(1)
            # Two different fractions differ by at least 1 / stride^2, so the noise decides nothing but ties.
            top = torch.topk(share + tie * 0.5 / stride**2, count, dim=-1).indices
            chosen.append(top.sort(dim=-1).values.unflatten(0, queried.shape[:2]))
        return tuple(chosen)

    def _sources(self, batch_size: int, generator: Generator | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return `sources`, `real` and `partners` of the plan."""
        num_global, num_local = self.num_global_crops, self.num_local_crops
        crops = torch.arange(num_global + num_local, device=self.device)
        own = self.starts[:num_global, None] + torch.arange(self.num_context, device=self.device)
        if self.masking_strategy == "global_only":
            return own.expand(batch_size, -1, -1), None, None
        if self.masking_strategy == "global_with_local_context":
            local = own.numel() + torch.arange(num_local * self.num_local_tokens, device=self.device)
            sources = torch.cat([own, local.expand(num_global, -1)], dim=1)
            partners = (crops >= num_global).expand(batch_size, num_global, -1)
            return sources.expand(batch_size, -1, -1), None, partners
        # cross_crop_prediction: draw one of the V - 1 other crops, by skipping the global itself.
        shape = (batch_size, num_global)
        crop = torch.randint(num_global + num_local - 1, shape, device=self.device, generator=generator)
        crop = crop + (crop >= crops[:num_global])
        start, count, partners = self.starts[crop][..., None], self.counts[crop][..., None], crop[..., None] == crops
        counts = [self.num_context] * (num_global > 1) + [self.num_local_tokens] * (num_local > 0)
        slots = torch.arange(max(counts), device=self.device)
        if min(counts) == max(counts):
            return start + slots, None, partners
        # A local and a global differ in length: repeating its first token pads the shorter kind to a static shape.
        real = slots < count
        return torch.where(real, start + slots, start), real, partners


def pool_cells(maps: Tensor, stride: int) -> Tensor:
    """Average over `stride x stride` cells, `[n, C, h, w] -> [n, C, ceil(h / stride), ceil(w / stride)]`, same dtype.

    Cells cut by the right or bottom edge average the tokens they have.
    """
    if stride == 1:
        return maps
    return F.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)
