"""Pictures of images: crops and their boxes, masks, features, nearest neighbours."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from model.encoder import MultiCropEncoder
from model.masks import MaskPlan, level_grid
from pipeline.batch import CropBatch
from pipeline.shards.index import UNLABELLED
from train.output.plots import plt, save_figure
from train.replay import Replay

if TYPE_CHECKING:
    from train.evaluation.online import Neighbours

GLOBAL_COLOUR, LOCAL_COLOUR = "#ffb000", "#00a6d6"
SHEET_SOURCE_INCHES, SHEET_CROP_INCHES = 4.2, 1.5


@dataclass(frozen=True)
class Views:
    """How the crops of a batch are drawn: names, colours and pixels; `mean` and `std` are those that normalised them.

    Globals have one colour and locals another, or each view has its own (`distinct`).
    """

    batch: CropBatch
    num_global: int
    mean: Sequence[float]
    std: Sequence[float]
    distinct: bool = False

    def __len__(self) -> int:
        return len(self.batch.crops)

    def name(self, v: int) -> str:
        return f"global {v}" if v < self.num_global else f"local {v - self.num_global}"

    def colour(self, v: int) -> Any:
        if self.distinct:
            return f"C{v}"
        return GLOBAL_COLOUR if v < self.num_global else LOCAL_COLOUR

    def pixels(self, v: int, i: int) -> np.ndarray:
        """`[S, S, 3] float32` in 0..1: crop `v` of image `i`."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.batch.crops[v][i].float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

    def is_flipped(self, v: int, i: int) -> bool:
        return bool(self.batch.flips[i, v])


def draw_view(axis: Any, views: Views, v: int, i: int) -> None:
    axis.imshow(views.pixels(v, i))
    axis.set_title(views.name(v) + (" (flipped)" if views.is_flipped(v, i) else ""), fontsize=8, color=views.colour(v))


def draw_source(axis: Any, encoded: bytes, views: Views, i: int) -> str:
    """The image that image `i` of the batch was cut from, with the boxes of its crops: dashed if flipped. Returns its size."""
    source = Image.open(io.BytesIO(encoded)).convert("RGB")
    axis.imshow(source)
    for v in range(len(views)):
        box = views.batch.boxes[i, v].cpu() * torch.tensor([source.height, source.width] * 2)
        y0, x0, y1, x1 = box.tolist()
        _outline(axis, (y0, x0, y1, x1), views.colour(v), 1.5, "--" if views.is_flipped(v, i) else "-")
    return f"{source.width}x{source.height}"


def _outline(axis: Any, box: tuple[float, float, float, float], colour: Any, width: float, style: str = "-") -> None:
    """`box`: y0, x0, y1, x1 in pixels. Pixel i covers i - 0.5 .. i + 0.5 in matplotlib's coordinates."""
    y0, x0, y1, x1 = box
    rectangle = plt.Rectangle(
        (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width, linestyle=style
    )
    axis.add_patch(rectangle)


def draw_crops(path: Path, views: Views, sources: Sequence[bytes]) -> None:
    """One row per image: its source with the boxes of its crops, then the crops as the encoder gets them."""
    sizes = [1.5] + [1.5 if v < views.num_global else 0.8 for v in range(len(views))]
    size = (1.4 * sum(sizes), 2.2 * len(sources))
    figure, axes = plt.subplots(
        len(sources), len(sizes), figsize=size, width_ratios=sizes, squeeze=False, layout="constrained"
    )
    for i, (source, row) in enumerate(zip(sources, axes, strict=True)):
        row[0].set_title(
            f"position {int(views.batch.positions[i])}, {draw_source(row[0], source, views, i)}", fontsize=8
        )
        for v, axis in enumerate(row[1:]):
            draw_view(axis, views, v, i)
    save_figure(path, figure)


def draw_masks(
    path: Path, views: Views, plan: MaskPlan, grid: int, strides: Sequence[int], rows: Sequence[tuple[int, int]]
) -> None:
    """One row per (image, global crop): the crop, what the encoder sees of it, and the cells to predict at each level."""
    columns = 2 + len(strides)
    size = (1.9 * columns, 2.05 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, (i, g) in zip(axes, rows, strict=True):
        draw_global_masks(row, views, plan, i, g, grid, strides)
        if len(rows) > 1:
            row[0].set_title(f"image {i}, {row[0].get_title()}", fontsize=8)
    save_figure(path, figure)


def draw_global_masks(
    axes: Sequence[Any], views: Views, plan: MaskPlan, i: int, g: int, grid: int, strides: Sequence[int]
) -> None:
    """One global crop on 2 + L axes. Other crops of the image that the predictor sees are outlined on it."""
    pixels = views.pixels(g, i)
    axes[0].imshow(pixels)
    axes[0].set_title(f"global {g}{_outline_partners(axes[0], views, plan, i, g)}", fontsize=8)
    context = _cells(plan.context[i, g], grid, 1, pixels.shape[0])
    axes[1].imshow(np.where(context[..., None], pixels, 0.5))
    axes[1].set_title(f"context: {plan.context.shape[-1]} of {grid**2} tokens", fontsize=8)
    for level, stride in enumerate(strides):
        cells = _cells(plan.queries[level][i, g], grid, stride, pixels.shape[0])
        tint = np.array([1.0, 0.69, 0.0])
        axes[2 + level].imshow(np.where(cells[..., None], 0.35 * pixels + 0.65 * tint, pixels))
        title = f"level {level}: {plan.queries[level].shape[-1]} of {level_grid(grid, stride) ** 2} cells"
        axes[2 + level].set_title(title, fontsize=8)


def _outline_partners(axis: Any, views: Views, plan: MaskPlan, i: int, g: int) -> str:
    """Outline the crops that global `g` is predicted from, where they meet it; returns the end of its title."""
    if plan.partners is None:
        return ""
    boxes, size, names = views.batch.boxes[i], views.batch.crops[g].shape[-1], []
    y0, x0, y1, x1 = boxes[g].tolist()
    for v in plan.partners[i, g].nonzero().flatten().tolist():
        top, left, bottom, right = boxes[v].tolist()
        top, bottom = ((y - y0) / (y1 - y0) * size for y in (top, bottom))
        left, right = ((x - x0) / (x1 - x0) * size for x in (left, right))
        if views.is_flipped(g, i):
            left, right = size - right, size - left
        _outline(axis, (top, left, bottom, right), GLOBAL_COLOUR if v < views.num_global else LOCAL_COLOUR, 2)
        names.append(views.name(v))
    return f" from {names[0]}" if len(names) == 1 else f" and {len(names)} locals"


def _cells(chosen: torch.Tensor, grid: int, stride: int, size: int) -> np.ndarray:
    """`[size, size] bool`: the pixels of the chosen cells of a level."""
    side = level_grid(grid, stride)
    cells = torch.zeros(side * side, dtype=torch.bool)
    cells[chosen.cpu()] = True
    patch = size // grid
    return np.kron(cells.view(side, side).numpy(), np.ones((stride * patch,) * 2, dtype=bool))[:size, :size]


def draw_sheet(path: Path, seen: Replay) -> None:
    """One band for each sample: its source with the boxes, its crops, the masks of its globals; each view has its own colour."""
    num_global = seen.masks.context.shape[1]
    views = Views(seen.batch, num_global, seen.dataset.mean, seen.dataset.std, distinct=True)
    masks_per_row = num_global * (2 + len(seen.strides))
    width = SHEET_SOURCE_INCHES + SHEET_CROP_INCHES * max(len(views), masks_per_row)
    figure = plt.figure(figsize=(width, 4.1 * len(seen.rows)), layout="constrained")
    for i, band in enumerate(np.atleast_1d(figure.subfigures(len(seen.rows), 1))):
        band.suptitle(seen.captions[i], fontsize=10)
        left, right = band.subfigures(1, 2, width_ratios=[SHEET_SOURCE_INCHES, width - SHEET_SOURCE_INCHES])
        above, below = right.subfigures(2, 1)
        axis = left.subplots()
        size = draw_source(axis, seen.dataset.index.encoded(seen.rows[i]), views, i)
        axis.set_title(f"source, {size} (dashed: flipped)", fontsize=9)
        sizes = [1.0 if v < num_global else 0.7 for v in range(len(views))]
        for v, axis in enumerate(above.subplots(1, len(views), width_ratios=sizes, squeeze=False)[0]):
            draw_view(axis, views, v, i)
        for g, row in enumerate(below.subplots(1, masks_per_row, squeeze=False)[0].reshape(num_global, -1)):
            draw_global_masks(row, views, seen.masks, i, g, seen.grid, seen.strides)
    save_figure(path, figure, dpi=100)


def draw_overview(
    path: Path, views: Views, i: int, source: bytes, plan: MaskPlan, strides: Sequence[int], colours: np.ndarray
) -> None:
    """Image `i` with its boxes, its crops, the masks of its first global and the features of its target, `[g, g, 3]`."""
    figure = plt.figure(figsize=(13, 4.8), layout="constrained")
    cells = figure.add_gridspec(2, 4 + 2 * (2 + len(strides)))
    whole = figure.add_subplot(cells[:, :4])
    draw_source(whole, source, views, i)
    whole.set_title(f"one image, {views.num_global} global and {len(views) - views.num_global} local crops (dashed: flipped)",
                    fontsize=9)  # fmt: skip
    column = 4
    for v in range(len(views)):
        width = 2 if v < views.num_global else 1
        axis = figure.add_subplot(cells[0, column : column + width])
        axis.imshow(views.pixels(v, i))
        axis.set_title(views.name(v), fontsize=8)
        column += width
    below = [figure.add_subplot(cells[1, 4 + 2 * k : 6 + 2 * k]) for k in range(2 + len(strides))]
    draw_global_masks(below, views, plan, i, 0, len(colours), strides)
    below[0].imshow(colours, interpolation="nearest", extent=(-0.5, views.batch.crops[0].shape[-1] - 0.5) * 2)
    below[0].set_title("its features, as colours", fontsize=8)
    save_figure(path, figure, dpi=90)


def feature_colours(encoder: MultiCropEncoder, crops: torch.Tensor) -> np.ndarray:
    """`[n, 3, S, S] -> [n, g, g, 3]`, 0..1: three principal components of all tokens, each from its 1st to 99th percentile."""
    with torch.inference_mode():
        tokens = encoder([(crops, None)])[0].tokens.float()
    flat = tokens.flatten(0, 1).cpu()
    centred = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    scores = torch.nn.functional.pad(centred @ axes.T, (0, 3 - len(axes)))
    low, high = (torch.quantile(scores, share, dim=0) for share in (0.01, 0.99))
    side = crops.shape[-1] // encoder.patch_size
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(len(crops), side, side, 3).numpy()


def draw_features(path: Path, views: Views, colours: np.ndarray) -> None:
    """The first global crop of each image above its tokens' features as colours, `[n, g, g, 3]`."""
    figure, axes = plt.subplots(2, len(colours), figsize=(2.2 * len(colours), 4.6), squeeze=False, layout="constrained")
    for i, colour in enumerate(colours):
        axes[0, i].imshow(views.pixels(0, i))
        axes[1, i].imshow(colour, interpolation="nearest")
    axes[0, 0].set_title("crop", fontsize=8)
    axes[1, 0].set_title("features: 3 principal components", fontsize=8)
    save_figure(path, figure)


def draw_neighbours(path: Path, rows: Sequence["Neighbours"], cell: int = 104, text: int = 14) -> None:
    """One row per validation image: itself, then its nearest training images, in green with the same label, in red with another.

    Drawn without matplotlib, which takes a second for so many axes.
    """
    columns = max(len(row.pictures) for row in rows)
    mosaic = Image.new("RGB", (columns * cell, len(rows) * (cell + text)), "white")
    canvas = ImageDraw.Draw(mosaic)
    for line, row in enumerate(rows):
        for number, (encoded, label) in enumerate(zip(row.pictures, row.labels, strict=True)):
            x, y = number * cell, line * (cell + text)
            parts = [f"class {label}"] if label != UNLABELLED else []
            colour = "black"
            if number:
                colour = "#606060" if label == UNLABELLED else "#2a8f2a" if label == row.labels[0] else "#c03030"
                parts.append(f"{row.similarities[number - 1]:.3f}")
            canvas.rectangle((x + 2, y + 2, x + cell - 3, y + cell - 3), fill=colour)
            picture = Image.open(io.BytesIO(encoded)).convert("RGB")
            mosaic.paste(ImageOps.pad(picture, (cell - 10, cell - 10), Image.Resampling.BOX), (x + 5, y + 5))
            canvas.text((x + 5, y + cell - 2), ", ".join(parts), fill=colour)
    mosaic.save(path)
