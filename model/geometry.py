"""Where the cells of a crop lie in its source image."""

import torch


def cell_centres(boxes: torch.Tensor, flips: torch.Tensor, grid: int, stride: int = 1) -> torch.Tensor:
    """Centres of all cells of a crop, in the source image: `[n, cells, 2] float32`, y and x in 0..1, row by row.

    `boxes`: `[n, 4] float32`, y0, x0, y1, x1 of the crop in its source, 0..1. `flips`: `[n] bool`, crop mirrored left to
    right. `grid`: patch tokens per side; cells of `stride` tokens, the last one cut by the edge.
    """
    starts = torch.arange(0, grid, stride, device=boxes.device, dtype=torch.float32)
    line = (starts + (starts + stride).clamp(max=grid)) / (2 * grid)
    y0, x0, y1, x1 = boxes[:, None, :].unbind(-1)
    y = y0 + (y1 - y0) * line
    x = x0 + (x1 - x0) * torch.where(flips[:, None], 1 - line, line)
    count = len(starts)
    return torch.stack([y[:, :, None].expand(-1, -1, count), x[:, None, :].expand(-1, count, -1)], dim=-1).flatten(1, 2)


def log_cell_size(boxes: torch.Tensor, grid: int, stride: int = 1) -> torch.Tensor:
    """`[n, 2] float32`: natural logarithm of a cell's height and width as shares of the source image."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return torch.log(sides * (stride / grid))


def covered(places: torch.Tensor, boxes: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """`[B, G, M] bool`: whether a place lies in the box of one of its crop's partners.

    `places`: `[B, G, M, 2]`, y and x in the source image. `boxes`: `[B, V, 4]`. `partners`: `[B, G, V] bool`.
    """
    y, x = places[..., None].unbind(-2)  # [B, G, M, 1]
    y0, x0, y1, x1 = boxes[:, None, None].unbind(-1)  # [B, 1, 1, V]
    inside = (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1)
    return (inside & partners[:, :, None]).any(dim=-1)
