"""Which tokens of the globals the student sees, and which it must predict."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")


@dataclass(frozen=True)
class MaskPlan:
    """Token indices for B images with G global crops each; static shapes, sorted along the last axis.

    `context`: `[B, G, K] int64`, tokens that the student encodes. `queries`: one `[B, G, M_l] int64` per level, cells of that
    level's grid to predict (coarsest cells may cover visible tokens too). `queries[0]` and `context` never share a token when
    the first level has stride 1.
    """

    context: torch.Tensor
    queries: tuple[torch.Tensor, ...]


def level_grid(grid: int, stride: int) -> int:
    """Cells per side of a level: the last cell is narrower when the stride does not divide the grid."""
    return math.ceil(grid / stride)


class MultiCropMaskGenerator:
    """Draws a `MaskPlan` on `device`, without a host sync.

    `num_masks` rectangles per global crop cover `mask_scale` of its area at `aspect_ratio` (height / width); every placement
    that fits the grid is equally likely. Exactly `query_ratio` of the `grid x grid` tokens are queried (cells inside the
    rectangles first) and exactly `context_ratio` are kept as context (cells outside first): the counts never vary, so the
    shapes do not either. After the block masking of I-JEPA (arXiv 2301.08243, section 3).

    Raises ValueError when the counts leave no context or no query.
    """

    def __init__(
        self,
        masking_strategy: str = "global_only",
        num_global_crops: int = 2,
        num_local_crops: int = 6,
        *,
        grid: int = 14,
        strides: tuple[int, ...] = (1, 2, 4),
        num_masks: int = 4,
        mask_scale: tuple[float, float] = (0.15, 0.2),
        aspect_ratio: tuple[float, float] = (0.75, 1.5),
        context_ratio: float = 0.4,
        query_ratio: float = 0.4,
        device: torch.device | str = "cpu",
    ) -> None:
        if masking_strategy not in STRATEGIES:
            raise ValueError(f"masking strategy {masking_strategy!r}: allowed are {', '.join(STRATEGIES)}")
        self.masking_strategy = masking_strategy
        self.num_global_crops, self.num_local_crops = num_global_crops, num_local_crops
        self.grid, self.strides, self.num_masks = grid, strides, num_masks
        self.mask_scale, self.aspect_ratio, self.device = mask_scale, aspect_ratio, torch.device(device)
        tokens = grid * grid
        self.num_context, self.num_queries = round(context_ratio * tokens), round(query_ratio * tokens)
        if self.num_context < 1 or self.num_queries < 1 or self.num_context + self.num_queries > tokens:
            raise ValueError(
                f"masking of a {grid}x{grid} grid: {self.num_context} context and {self.num_queries} query tokens of {tokens}. "
                "Both must be at least 1 and fit together: change context_ratio, query_ratio or the crop size"
            )
        cells = [level_grid(grid, stride) ** 2 for stride in strides]
        self.level_queries = tuple(max(1, round(query_ratio * count)) for count in cells)

    def __call__(
        self, batch_size: int, boxes: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> MaskPlan:
        """Draw for `batch_size` images. `generator` lives on the plan's device; `boxes` are not needed by `global_only`."""
        shape = (batch_size, self.num_global_crops)
        tokens = self.grid * self.grid
        covered = self._blocks(shape, generator).flatten(2)
        noise = torch.rand(*shape, tokens, device=self.device, generator=generator)
        # One ranking serves both: covered cells in random order, then the others in random order. Queries are taken from
        # its top and context from its bottom, so they cannot meet.
        ranking = torch.argsort(covered + noise, dim=-1, descending=True)
        queried, context = ranking[..., : self.num_queries], ranking[..., tokens - self.num_context :]
        queried_map = torch.zeros(*shape, tokens, device=self.device).scatter_(-1, queried, 1.0)
        return MaskPlan(context.sort(dim=-1).values, self._level_queries(queried_map, noise))

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
