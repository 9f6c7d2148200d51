"""Captioned tiles of crops and masks, and their composition with PIL: matplotlib takes seconds for so many axes."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from model.masks import MaskPlan, level_grid
from pipeline.dataset import CropBatch

GLOBAL_COLOUR, LOCAL_COLOUR = "#ffb000", "#00a6d6"
QUERY_COLOUR = np.array([1.0, 0.69, 0.0])  # that of globals
VIEW_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
GAP, CAPTION, FONT_SIZE = 8, 20, 12  # pixels
GLOBAL_SIDE, LOCAL_SIDE = 200, 112  # of a tile; a local crop's caption needs 112
DASH = 10  # pixels from the start of one dash to the next


Outline = tuple[Sequence[float], str, bool]
"""A box drawn on a picture: y0, x0, y1, x1 as fractions of its height and width, its colour, and True for a dashed line."""


@dataclass(frozen=True)
class Views:
    """How the crops of a batch are drawn: names, colours and pixels. `mean` and `std` are those that normalised them.

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

    def colour(self, v: int) -> str:
        if self.distinct:
            return VIEW_COLOURS[v % len(VIEW_COLOURS)]
        return GLOBAL_COLOUR if v < self.num_global else LOCAL_COLOUR

    def pixels(self, v: int, i: int) -> np.ndarray:
        """Return crop `v` of image `i`: `[S, S, 3] float32` in 0..1."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.batch.crops[v][i].float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

    def is_flipped(self, v: int, i: int) -> bool:
        return bool(self.batch.flips[i, v])


def crop_tiles(views: Views, i: int) -> list[Image.Image]:
    """Return the crops of image `i`, each under its name."""
    tiles = []
    for v in range(len(views)):
        caption = views.name(v) + (" (flipped)" if views.is_flipped(v, i) else "")
        side = GLOBAL_SIDE if v < views.num_global else LOCAL_SIDE
        tiles.append(tile(to_picture(views.pixels(v, i)), caption, side, views.colour(v)))
    return tiles


def source_tile(source: Image.Image, caption: str, views: Views, i: int, side: int) -> Image.Image:
    """Return the image that image `i` of the batch was cut from, with the boxes of its crops: dashed if flipped."""
    boxes = views.batch.boxes[i].tolist()
    outlines = [(box, views.colour(v), views.is_flipped(v, i)) for v, box in enumerate(boxes)]
    return tile(source, caption, side, outlines=outlines)


def mask_tiles(
    views: Views, plan: MaskPlan, i: int, g: int, grid: int, strides: Sequence[int], prefix: str = ""
) -> list[Image.Image]:
    """Return 2 + L tiles of one global crop. Other crops of the image that the predictor sees are outlined on the first."""
    pixels = views.pixels(g, i)
    outlines, suffix = _partners(views, plan, i, g)
    seen = _cells(plan.context[i, g], grid, 1, len(pixels))
    pictures = {
        f"{prefix}global {g}{suffix}": pixels,
        f"context: {plan.context.shape[-1]} of {grid**2} tokens": np.where(seen, pixels, 0.5),
    }
    for level, (stride, queries) in enumerate(zip(strides, plan.queries, strict=True)):
        caption = f"level {level}: {queries.shape[-1]} of {level_grid(grid, stride) ** 2} cells"
        tinted = 0.35 * pixels + 0.65 * QUERY_COLOUR
        pictures[caption] = np.where(_cells(queries[i, g], grid, stride, len(pixels)), tinted, pixels)
    return [
        tile(to_picture(picture), caption, GLOBAL_SIDE, outlines=() if number else outlines)
        for number, (caption, picture) in enumerate(pictures.items())
    ]


def _partners(views: Views, plan: MaskPlan, i: int, g: int) -> tuple[list[Outline], str]:
    """Return outlines of the crops that global `g` is predicted from, in its own coordinates, and the end of its caption."""
    if plan.partners is None:
        return [], ""
    boxes, names = views.batch.boxes[i], []
    outlines: list[Outline] = []
    y0, x0, y1, x1 = boxes[g].tolist()
    for v in plan.partners[i, g].nonzero().flatten().tolist():
        top, left, bottom, right = boxes[v].tolist()
        top, bottom = ((y - y0) / (y1 - y0) for y in (top, bottom))
        left, right = ((x - x0) / (x1 - x0) for x in (left, right))
        if views.is_flipped(g, i):
            left, right = 1 - right, 1 - left
        colour = GLOBAL_COLOUR if v < views.num_global else LOCAL_COLOUR
        outlines.append(((top, left, bottom, right), colour, False))
        names.append(views.name(v))
    return outlines, f" from {names[0]}" if len(names) == 1 else f" and {len(names)} locals"


def _cells(chosen: torch.Tensor, grid: int, stride: int, size: int) -> np.ndarray:
    """Return `[size, size, 1] bool`: the pixels of the chosen cells of a level."""
    side = level_grid(grid, stride)
    cells = torch.zeros(side * side, dtype=torch.bool)
    cells[chosen.cpu()] = True
    patch = size // grid
    return np.kron(cells.view(side, side).numpy(), np.ones((stride * patch,) * 2, dtype=bool))[:size, :size, None]


def open_picture(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def to_picture(pixels: np.ndarray) -> Image.Image:
    """`[H, W, 3]` in 0..1."""
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture scaled to a longer side of `side` pixels. Enlarged pixels stay squares."""
    enlarged = max(picture.size) < side
    return ImageOps.contain(picture, (side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


@cache
def font() -> Any:
    return ImageFont.load_default(FONT_SIZE)


def text_line(text: str) -> Image.Image:
    """Return a line of text as a picture."""
    line = Image.new("RGB", (round(font().getlength(text)) + 2 * GAP, CAPTION), "white")
    ImageDraw.Draw(line).text((GAP, CAPTION / 2), text, fill="black", font=font(), anchor="lm")
    return line


def tile(
    picture: Image.Image, caption: str, side: int, colour: str = "black", outlines: Iterable[Outline] = ()
) -> Image.Image:
    """Return the picture, fitted into a square of `side` pixels, under its caption."""
    picture = fit(picture, side)
    canvas = ImageDraw.Draw(picture)
    for box, line_colour, dashed in outlines:
        y0, x0, y1, x1 = np.multiply(box, [picture.height, picture.width] * 2) - [0, 0, 1, 1]
        for start, end in pairwise(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])):
            count = max(1, round(np.abs(end - start).sum() / DASH)) if dashed else 1
            for n in range(count):
                dash = [start + (end - start) * part / count for part in (n, n + (0.6 if dashed else 1))]
                canvas.line([tuple(point) for point in dash], fill=line_colour, width=2)
    captioned = Image.new("RGB", (side, side + CAPTION), "white")
    captioned.paste(picture, ((side - picture.width) // 2, CAPTION + (side - picture.height) // 2))
    ImageDraw.Draw(captioned).text((side / 2, CAPTION / 2), caption, fill=colour, font=font(), anchor="mm")
    return captioned


def hstack(pictures: Iterable[Image.Image]) -> Image.Image:
    """Return pictures side by side, centred vertically."""
    return vstack([picture.transpose(Image.Transpose.TRANSPOSE) for picture in pictures], align=0.5).transpose(
        Image.Transpose.TRANSPOSE
    )


def vstack(pictures: Iterable[Image.Image], align: float = 0.0) -> Image.Image:
    """Return pictures below one another: aligned at the left (0), centred (0.5) or at the right (1)."""
    pictures = list(pictures)
    width, height = max(p.width for p in pictures), sum(p.height + GAP for p in pictures) - GAP
    column, y = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        column.paste(picture, (round(align * (width - picture.width)), y))
        y += picture.height + GAP
    return column


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write the picture as PNG, with a white margin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ImageOps.expand(picture, GAP, "white").save(path)
