"""Which tokens of the globals the student sees, which are to be predicted, and from what."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import defaults

STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")
UNMASKED = "none"  # the strategy without prediction, which therefore masks nothing
ALLOWED = (*STRATEGIES, UNMASKED)


@dataclass(frozen=True)
class MaskPlan:
    """Token indices for B images with G global crops each, of V crops; static shapes.

    `context`: `[B, G, K] int64`, ascending: tokens that the student encodes. `queries`: one `[B, G, M_l] int64` per level,
    ascending: cells of that level's grid to predict (coarsest cells may cover visible tokens too). `queries[0]` and `context`
    never share a token when the first level has stride 1.

    `sources`: `[B, G, C] int64`, the tokens that the predictor sees to predict each global. They number the image's encoded
    tokens: K of every global, then all of every local. `real`: `[B, G, C] bool`, false where a source only fills the row up;
    None when none does. `partners`: `[B, G, V] bool`, the crops other than the global itself that sources come from; None when
    there are none.
    """

    context: torch.Tensor
    queries: tuple[torch.Tensor, ...]
    sources: torch.Tensor
    real: torch.Tensor | None = None
    partners: torch.Tensor | None = None


def level_grid(grid: int, stride: int) -> int:
    """Cells per side of a level: the last cell is narrower when the stride does not divide the grid."""
    return math.ceil(grid / stride)


class MultiCropMaskGenerator:
    """Draws a `MaskPlan` on `device`, without a host sync.

    `num_masks` rectangles per global crop cover `mask_scale` of its area at `aspect_ratio` (height / width); every placement
    that fits the grid is equally likely. Exactly `query_ratio` of the `grid x grid` tokens are queried (cells inside the
    rectangles first) and exactly `context_ratio` are kept as context (cells outside first): the counts never vary, so the
    shapes do not either. After the block masking of I-JEPA (arXiv 2301.08243, section 3).

    The strategies differ in what the predictor sees to predict a global: `global_only`, that global's context;
    `global_with_local_context`, all locals too; `cross_crop_prediction`, one other crop of the image, each equally likely (a
    local whole, or the context of another global), and nothing of the global itself. Locals have `local_grid` tokens per side.
    `none` keeps every token as context, asks for nothing and draws nothing; ratios and rectangles do not matter to it.

    Raises ValueError when the counts leave no context or no query, when a rectangle can be larger than the grid, and when
    the strategy needs crops that are not there.
    """

    def __init__(
        self,
        masking_strategy: str,
        num_global_crops: int,
        num_local_crops: int,
        *,
        grid: int = 14,
        local_grid: int = 6,
        strides: tuple[int, ...] = (1, 2, 4),
        num_masks: int = defaults.NUM_MASKS,
        mask_scale: tuple[float, float] = defaults.MASK_SCALE,
        aspect_ratio: tuple[float, float] = defaults.ASPECT_RATIO,
        context_ratio: float = defaults.CONTEXT_RATIO,
        query_ratio: float = defaults.QUERY_RATIO,
        device: torch.device | str = "cpu",
    ) -> None:
        if masking_strategy not in ALLOWED:
            raise ValueError(f"masking strategy {masking_strategy!r}: allowed are {', '.join(ALLOWED)}")
        partners = {
            "global_with_local_context": num_local_crops,
            "cross_crop_prediction": num_global_crops + num_local_crops - 1,
        }
        if num_global_crops < 1 or partners.get(masking_strategy, 1) < 1:
            second = {"global_with_local_context": " and a local crop", "cross_crop_prediction": " and another crop"}
            raise ValueError(
                f"{masking_strategy} with {num_global_crops} global and {num_local_crops} local crops: "
                f"it needs a global crop{second.get(masking_strategy, '')}"
            )
        self.masking_strategy = masking_strategy
        self.num_global_crops, self.num_local_crops = num_global_crops, num_local_crops
        self.num_local_tokens = local_grid * local_grid
        self.grid, self.strides, self.num_masks = grid, strides, num_masks
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
        cells = [level_grid(grid, stride) ** 2 for stride in strides]
        self.level_queries = tuple(max(1, round(query_ratio * count)) for count in cells)

    def __call__(self, batch_size: int, generator: torch.Generator | None = None) -> MaskPlan:
        """Draw for `batch_size` images. `generator` lives on the plan's device."""
        shape = (batch_size, self.num_global_crops)
        tokens = self.grid * self.grid
        if self.masking_strategy == UNMASKED:
            every = torch.arange(tokens, device=self.device).expand(*shape, -1)
            return MaskPlan(every, (), every[..., :0])
        covered = self._blocks(shape, generator).flatten(2)
        noise = torch.rand(*shape, tokens, device=self.device, generator=generator)
        # One ranking serves both: covered cells in random order, then the others in random order. Queries are taken from
        # its top and context from its bottom, so they cannot meet.
        ranking = torch.argsort(covered + noise, dim=-1, descending=True)
        queried, context = ranking[..., : self.num_queries], ranking[..., tokens - self.num_context :]
        queried_map = torch.zeros(*shape, tokens, device=self.device).scatter_(-1, queried, 1.0)
        queries = self._level_queries(queried_map, noise)
        return MaskPlan(context.sort(dim=-1).values, queries, *self._sources(batch_size, generator))

    def _sources(
        self, batch_size: int, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`sources`, `real` and `partners` of the plan."""
        num_global, num_local, num_context = self.num_global_crops, self.num_local_crops, self.num_context
        views = torch.arange(num_global + num_local, device=self.device)
        own = torch.arange(num_global * num_context, device=self.device).view(num_global, num_context)
        if self.masking_strategy == "global_only":
            return own.expand(batch_size, -1, -1), None, None
        if self.masking_strategy == "global_with_local_context":
            local = num_global * num_context + torch.arange(num_local * self.num_local_tokens, device=self.device)
            sources = torch.cat([own, local.expand(num_global, -1)], dim=1)
            partners = (views >= num_global).expand(batch_size, num_global, -1)
            return sources.expand(batch_size, -1, -1), None, partners
        shape = (batch_size, num_global)
        crop = torch.randint(num_global + num_local - 1, shape, device=self.device, generator=generator)
        crop = (crop + (crop >= views[:num_global]))[..., None]  # any but the global itself
        after = num_global * num_context + (crop - num_global) * self.num_local_tokens
        start = torch.where(crop < num_global, crop * num_context, after)
        lengths = ([num_context] if num_global > 1 else []) + ([self.num_local_tokens] if num_local else [])
        slots = torch.arange(max(lengths), device=self.device)
        if min(lengths) == max(lengths):
            return start + slots, None, crop == views
        real = slots < torch.where(crop < num_global, num_context, self.num_local_tokens)
        return torch.where(real, start + slots, start), real, crop == views

    def _check_rectangles(self) -> None:
        area = max(self.mask_scale) * self.grid**2
        height, width = (area * max(self.aspect_ratio)) ** 0.5, (area / min(self.aspect_ratio)) ** 0.5
        if self.num_masks < 1 or min(self.mask_scale) <= 0 or min(self.aspect_ratio) <= 0:
            raise ValueError(
                f"num_masks {self.num_masks}, mask_scale {self.mask_scale}, aspect_ratio {self.aspect_ratio}: "
                "all must be above 0"
            )
        if round(max(height, width)) > self.grid:
            raise ValueError(
                f"mask_scale up to {max(self.mask_scale)} at aspect_ratio {self.aspect_ratio} makes rectangles of up to "
                f"{height:.1f} x {width:.1f} tokens (height x width), larger than the {self.grid}x{self.grid} grid"
            )

    def _blocks(self, shape: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
        """`[B, G, grid, grid] float32`: 1 inside the union of the rectangles."""
        u = torch.rand(4, *shape, self.num_masks, device=self.device, generator=generator)
        low, high = (math.log(value) for value in self.aspect_ratio)
        area = (self.mask_scale[0] + (self.mask_scale[1] - self.mask_scale[0]) * u[0]) * self.grid**2
        aspect = torch.exp(low + (high - low) * u[1])
        height = (area * aspect).sqrt().round().clamp(1, self.grid)
        width = (area / aspect).sqrt().round().clamp(1, self.grid)
        top = (u[2] * (self.grid - height + 1)).floor()
        left = (u[3] * (self.grid - width + 1)).floor()
        line = torch.arange(self.grid, device=self.device)
        rows = (line >= top[..., None]) & (line < (top + height)[..., None])
        columns = (line >= left[..., None]) & (line < (left + width)[..., None])
        return (rows[..., :, None] & columns[..., None, :]).any(dim=2).float()

    def _level_queries(self, queried: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per level, the cells with the largest queried share; ties are broken at random."""
        maps = torch.stack([queried, noise], dim=2).unflatten(-1, (self.grid, self.grid)).flatten(0, 1)
        chosen = []
        for stride, count in zip(self.strides, self.level_queries, strict=True):
            share, tie = pool_cells(maps, stride).flatten(2).unbind(1)
            # The smallest difference of two shares is 1 / stride^2, so the noise decides ties only.
            top = torch.topk(share + tie * 0.5 / stride**2, count, dim=-1).indices
            chosen.append(top.sort(dim=-1).values.unflatten(0, queried.shape[:2]))
        return tuple(chosen)


def pool_cells(maps: torch.Tensor, stride: int) -> torch.Tensor:
    """Mean over `stride x stride` cells: `[n, C, h, w]` -> `[n, C, ceil(h / stride), ceil(w / stride)]`, same dtype.

    Cells cut by the right or bottom edge average the tokens they have.
    """
    if stride == 1:
        return maps
    return F.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)
