"""Pictures of a run: its crops, its masks, its features and its curves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageOps

from model.masks import MaskPlan, level_grid
from pipeline.batch import CropBatch
from pipeline.shards.index import UNLABELLED, ShardIndex

GLOBAL_COLOUR, LOCAL_COLOUR = "#ffb000", "#00a6d6"


def to_picture(crop: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised `[3, S, S]` crop as `[S, S, 3] float32` in 0..1."""
    pixels = crop.float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return pixels.clamp(0, 1).permute(1, 2, 0).numpy()


def draw_crops(
    path: Path,
    batch: CropBatch,
    index: ShardIndex,
    rows: Sequence[int] | np.ndarray,
    num_global: int,
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 4,
) -> None:
    """One row per image, `rows` of the index: the source with the boxes of its crops, then the crops as the encoder gets them."""
    count = min(count, len(batch.labels))
    views = len(batch.crops)
    sizes = [1.5] + [1.5 if v < num_global else 0.8 for v in range(views)]
    figure, axes = plt.subplots(
        count,
        views + 1,
        figsize=(1.4 * sum(sizes), 2.2 * count),
        width_ratios=sizes,
        squeeze=False,
        layout="constrained",
    )
    for i in range(count):
        position = int(batch.positions[i])
        source = Image.open(io.BytesIO(index.encoded(int(rows[i])))).convert("RGB")
        draw_source(axes[i, 0], source, batch, i, view_colours(num_global, views))
        axes[i, 0].set_title(f"position {position}, {source.width}x{source.height}", fontsize=8)
        for v in range(views):
            colour = GLOBAL_COLOUR if v < num_global else LOCAL_COLOUR
            axes[i, v + 1].imshow(to_picture(batch.crops[v][i], mean, std))
            kind = f"global {v}" if v < num_global else f"local {v - num_global}"
            flipped = " (flipped)" if bool(batch.flips[i, v]) else ""
            axes[i, v + 1].set_title(kind + flipped, fontsize=8, color=colour)
    _finish(figure, axes, path)


def view_colours(num_global: int, views: int) -> list[str]:
    return [GLOBAL_COLOUR if v < num_global else LOCAL_COLOUR for v in range(views)]


def draw_source(axis: Any, source: Image.Image, batch: CropBatch, i: int, colours: Sequence[Any]) -> None:
    """The photograph that image `i` of the batch was cut from, with the boxes of its crops: dashed where mirrored."""
    axis.imshow(source)
    for v, colour in enumerate(colours):
        y0, x0, y1, x1 = (batch.boxes[i, v].cpu() * torch.tensor([source.height, source.width] * 2)).tolist()
        line = {"edgecolor": colour, "linewidth": 1.5, "linestyle": "--" if bool(batch.flips[i, v]) else "-"}
        # Pixel i covers i - 0.5 .. i + 0.5 in matplotlib's coordinates.
        axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, **line))


def draw_masks(
    path: Path,
    batch: CropBatch,
    plan: MaskPlan,
    grid: int,
    strides: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 4,
) -> None:
    """One row per global crop: the crop, what the student sees of it, and the cells to predict at each level.

    Where the predictor sees other crops of the image, their outlines are drawn on the crop.
    """
    count, num_global = min(count, len(batch.labels)), plan.context.shape[1]
    rows = [(i, g) for i in range(count) for g in range(num_global)]
    columns = 2 + len(strides)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.9 * columns, 2.05 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, (i, g) in zip(axes, rows, strict=True):
        draw_global_masks(row, batch, plan, i, g, grid, strides, mean, std)
        row[0].set_title(f"image {i}, {row[0].get_title()}", fontsize=8)
    _finish(figure, axes, path)


def draw_global_masks(
    axes: Sequence[Any],
    batch: CropBatch,
    plan: MaskPlan,
    i: int,
    g: int,
    grid: int,
    strides: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """One global crop on 2 + L axes: the crop, what the student sees of it, and the cells to predict at each level."""
    picture = to_picture(batch.crops[g][i], mean, std)
    axes[0].imshow(picture)
    axes[0].set_title(f"global {g}{_draw_partners(axes[0], batch, plan, i, g)}", fontsize=8)
    context = _cells(plan.context[i, g], grid, 1, picture.shape[0])
    axes[1].imshow(np.where(context[..., None], picture, 0.5))
    axes[1].set_title(f"context: {plan.context.shape[-1]} of {grid**2} tokens", fontsize=8)
    for level, stride in enumerate(strides):
        cells = _cells(plan.queries[level][i, g], grid, stride, picture.shape[0])
        tint = np.array([1.0, 0.69, 0.0])
        axes[2 + level].imshow(np.where(cells[..., None], 0.35 * picture + 0.65 * tint, picture))
        title = f"level {level}: {plan.queries[level].shape[-1]} of {level_grid(grid, stride) ** 2} cells"
        axes[2 + level].set_title(title, fontsize=8)


def _draw_partners(axis: Any, batch: CropBatch, plan: MaskPlan, i: int, g: int) -> str:
    """Outline the crops that global `g` is predicted from, where they meet it; returns the end of its title."""
    if plan.partners is None:
        return ""
    num_global, size, names = plan.context.shape[1], batch.crops[g].shape[-1], []
    y0, x0, y1, x1 = batch.boxes[i, g].tolist()
    for v in plan.partners[i, g].nonzero().flatten().tolist():
        top, left, bottom, right = batch.boxes[i, v].tolist()
        top, bottom = ((y - y0) / (y1 - y0) * size for y in (top, bottom))
        left, right = ((x - x0) / (x1 - x0) * size for x in (left, right))
        if bool(batch.flips[i, g]):
            left, right = size - right, size - left
        colour = GLOBAL_COLOUR if v < num_global else LOCAL_COLOUR
        outline = Rectangle(
            (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2
        )
        axis.add_patch(outline)
        names.append(f"global {v}" if v < num_global else f"local {v - num_global}")
    return f" from {names[0]}" if len(names) == 1 else f" and {len(names)} locals"


def _cells(chosen: torch.Tensor, grid: int, stride: int, size: int) -> np.ndarray:
    """`[size, size] bool`: the pixels of the chosen cells of a level."""
    side = level_grid(grid, stride)
    cells = torch.zeros(side * side, dtype=torch.bool)
    cells[chosen.cpu()] = True
    patch = size // grid
    return np.kron(cells.view(side, side).numpy(), np.ones((stride * patch,) * 2, dtype=bool))[:size, :size]


def draw_features(
    path: Path,
    crops: torch.Tensor,
    colours: torch.Tensor,
    grid: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Crops `[n, 3, S, S]` above their tokens' features as colours, `[n, grid * grid, 3]` in 0..1."""
    figure, axes = plt.subplots(2, len(crops), figsize=(2.2 * len(crops), 4.6), squeeze=False, layout="constrained")
    for column, (crop, colour) in enumerate(zip(crops, colours, strict=True)):
        axes[0, column].imshow(to_picture(crop, mean, std))
        axes[1, column].imshow(colour.unflatten(0, (grid, grid)).numpy(), interpolation="nearest")
    axes[0, 0].set_title("crop", fontsize=8)
    axes[1, 0].set_title("features: 3 principal components", fontsize=8)
    _finish(figure, axes, path)


@dataclass(frozen=True)
class Neighbours:
    """An image and its nearest others: their files and labels, the image first, and the others' cosine similarities."""

    pictures: list[bytes]
    labels: list[int]
    similarities: list[float]


def draw_neighbours(path: Path, rows: Sequence[Neighbours], cell: int = 104, text: int = 14) -> None:
    """One row per validation image: itself, then its nearest training images, in green with the same label, in red with another.

    Drawn without matplotlib, which takes a second for as many axes.
    """
    columns = max(len(row.pictures) for row in rows)
    sheet = Image.new("RGB", (columns * cell, len(rows) * (cell + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        for number, (encoded, label) in enumerate(zip(row.pictures, row.labels, strict=True)):
            x, y = number * cell, line * (cell + text)
            parts = [f"class {label}"] if label != UNLABELLED else []
            colour = "black"
            if number:
                colour = "#606060" if label == UNLABELLED else "#2a8f2a" if label == row.labels[0] else "#c03030"
                parts.append(f"{row.similarities[number - 1]:.3f}")
            caption = ", ".join(parts)
            draw.rectangle((x + 2, y + 2, x + cell - 3, y + cell - 3), fill=colour)
            picture = Image.open(io.BytesIO(encoded)).convert("RGB")
            sheet.paste(ImageOps.pad(picture, (cell - 10, cell - 10), Image.Resampling.BOX), (x + 5, y + 5))
            draw.text((x + 5, y + cell - 2), caption, fill=colour)
    sheet.save(path)


def draw_curves(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Every loss, the collapse signals, the speed and the schedule over the steps of a run."""
    levels = sorted(name for name in metrics[0] if name.startswith("level_"))
    panels = [
        ("loss", ["loss"]),
        ("prediction, by level", [*levels, "inside", "outside"]),
        ("view term", ["view"]),
        ("SIGReg", ["sigreg"]),
        ("RankMe of pooled features", ["rankme"]),
        ("images/s", ["images_per_s"]),
        ("data wait, % of the step", ["data_wait_percent"]),
        ("learning rate", ["lr"]),
    ]
    figure, axes = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    steps = [line["step"] for line in metrics]
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            if name in metrics[0]:
                axis.plot(steps, [line[name] for line in metrics], label=name, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _finish(figure: Any, axes: np.ndarray, path: Path) -> None:
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
