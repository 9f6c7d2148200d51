"""Where the cells of a crop lie in its source image: the one coordinate system that all crops of an image share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """Squares of a crop, in the coordinates of its source image.

    `centres`: `[n, M, 2] float32`, y and x, 0..1. `log_sizes`: `[n, M, 2] float32`, natural logarithms of height and width as
    fractions of the image.
    """

    centres: Tensor
    log_sizes: Tensor


def crop_cells(boxes: Tensor, flips: Tensor, grid: int, stride: int = 1, chosen: Tensor | None = None) -> Cells:
    """Return the `chosen` cells of each crop (`[n, M] int64`; None: all). Other arguments are those of `cell_centres`."""
    centres = cell_centres(boxes, flips, grid, stride)
    if chosen is not None:
        centres = torch.take_along_dim(centres, chosen[..., None], dim=1)
    return Cells(centres, log_cell_size(boxes, grid, stride)[:, None].expand(-1, centres.shape[1], -1))


def cell_centres(boxes: Tensor, flips: Tensor, grid: int, stride: int = 1) -> Tensor:
    """Return the centres of all cells of a crop in its source image: `[n, cells, 2] float32`, y and x, 0..1, row-major.

    `boxes`: `[n, 4] float32`, 0..1, y0, x0, y1, x1 of the crop in its source. `flips`: `[n] bool`, true if the crop is mirrored
    left to right. `grid`: patch tokens per side. A cell spans `stride` tokens per side; the last one is cut by the edge.
    """
    starts = torch.arange(0, grid, stride, device=boxes.device, dtype=torch.float32)
    middles = (starts + (starts + stride).clamp(max=grid)) / (2 * grid)
    y0, x0, y1, x1 = boxes[:, None, :].unbind(-1)
    y = y0 + (y1 - y0) * middles
    x = x0 + (x1 - x0) * torch.where(flips[:, None], 1 - middles, middles)
    count = len(starts)
    return torch.stack([y[:, :, None].expand(-1, -1, count), x[:, None, :].expand(-1, count, -1)], dim=-1).flatten(1, 2)


def log_cell_size(boxes: Tensor, grid: int, stride: int = 1) -> Tensor:
    """Return the natural logarithm of a cell's height and width as fractions of the source image, `[n, 2] float32`."""
    return torch.log((boxes[:, 2:] - boxes[:, :2]) * (stride / grid))
