"""Pictures of crops, masks, features and neighbours: captioned tiles, composed with PIL, which is faster than matplotlib here."""

import io
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from model.masks import MaskPlan, MultiCropMaskGenerator, level_grid
from pipeline.dataset import CropBatch, MultiCropDataset
from pipeline.shards.index import UNLABELLED
from pipeline.text import printable
from train.build import build_loader
from train.config.schema import Config
from train.trainer import step_seed

if TYPE_CHECKING:
    from train.evaluation.online import Neighbours

NUM_PICTURED, NUM_MASKED = 4, 2  # images in crops.png and features.png, and in masks.png
QUERIES, NEIGHBOURS = 6, 7  # in neighbours.png
QUERY_COLOUR = np.array([1.0, 0.69, 0.0])
VIEW_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
INK = (118, 124, 130)  # of captions: readable on white and on black, since pictures are transparent where they are empty
CLEAR = (*INK, 0)  # transparent; in the colour of the ink, so that the edges of letters blend well
GAP, CAPTION, LINE, FONT_SIZE = 8, 20, 15, 12  # pixels: CAPTION of a caption's first line, LINE of each further one
GLOBAL_SIDE, LOCAL_SIDE, NEIGHBOUR_SIDE = 200, 112, 104  # of a tile; a local crop's caption needs 112
DASH = 10  # pixels from the start of one dash to the next

Outline = tuple[Sequence[float], str, bool]
"""A box drawn on a picture: y0, x0, y1, x1 as fractions of its height and width, its colour, and True for a dashed line."""


class Views(NamedTuple):
    """How the crops of a batch are drawn: names, colours and pixels. `mean` and `std` are those that normalised them."""

    batch: CropBatch
    num_global: int
    mean: Sequence[float]
    std: Sequence[float]

    def name(self, v: int) -> str:
        return f"global {v}" if v < self.num_global else f"local {v - self.num_global}"

    def colour(self, v: int) -> str:
        return VIEW_COLOURS[v % len(VIEW_COLOURS)]

    def pixels(self, v: int, i: int) -> np.ndarray:
        """Return crop `v` of image `i`: `[S, S, 3] float32` in 0..1."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.batch.crops[v][i].float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def draw_run(
    folder: Path, config: Config, dataset: MultiCropDataset, model: HJEPA, masks: MultiCropMaskGenerator,
    neighbours: Sequence["Neighbours"] = (),
) -> list[Path]:  # fmt: skip
    """Draw `folder/figures/*.png` and return their paths.

    crops and masks show the first positions of epoch 0, with the crops that are trained on. Pictures that do not apply are
    removed: masks.png where nothing is masked, neighbours.png without neighbours.
    """
    count = min(NUM_PICTURED, len(dataset))
    loader = build_loader(config, dataset, count)
    batch, rows = next(iter(loader)), loader.rows_at(0, 0, count).tolist()
    sources, names = [dataset.index.encoded(row) for row in rows], [dataset.index.name(row) for row in rows]
    views = Views(batch, model.num_global, dataset.mean, dataset.std)
    torch.manual_seed(step_seed(config.seed, 0, 1))
    plan, globals_ = masks(count), range(model.num_global)
    pictures: dict[str, list[list[Image.Image]]] = {"crops": [], "masks": []}
    for i, (source, name) in enumerate(zip(sources, names, strict=True)):
        pictures["crops"] += [[text_line(name)], [source_tile(views, i, source), *crop_tiles(views, i)]]
        if i < NUM_MASKED and plan.context.shape[-1] < model.grid**2:
            tiles = [mask_tiles(views, plan, i, g, model.grid, masks.strides) for g in globals_]
            pictures["masks"] += [[text_line(name)], *tiles]
    crops = [tile(to_picture(views.pixels(0, i)), name, GLOBAL_SIDE) for i, name in enumerate(names)]
    colours = feature_colours(model.target, batch.crops[0])
    pictures["features"] = [crops, [tile(to_picture(colour), "its features", GLOBAL_SIDE) for colour in colours]]
    pictures["neighbours"] = [neighbour_tiles(row) for row in neighbours]
    paths = {name: folder / "figures" / f"{name}.png" for name in pictures}
    for name, tiles in pictures.items():
        if tiles:
            save_rows(paths[name], tiles)
        else:
            paths[name].unlink(missing_ok=True)
    return [path for path in paths.values() if path.exists()]


def crop_tiles(views: Views, i: int) -> list[Image.Image]:
    """Return the crops of image `i`, each under its name."""
    tiles = []
    for v in range(len(views.batch.crops)):
        caption = views.name(v) + (" (flipped)" if views.batch.flips[i, v] else "")
        side = GLOBAL_SIDE if v < views.num_global else LOCAL_SIDE
        tiles.append(tile(to_picture(views.pixels(v, i)), caption, side, views.colour(v)))
    return tiles


def source_tile(views: Views, i: int, encoded: bytes, side: int = GLOBAL_SIDE, note: str = "") -> Image.Image:
    """Return the image that image `i` of the batch was cut from, with the boxes of its crops: dashed if flipped."""
    source = open_picture(encoded)
    boxes, flips = views.batch.boxes[i].tolist(), views.batch.flips[i].tolist()
    outlines = [(box, views.colour(v), bool(flips[v])) for v, box in enumerate(boxes)]
    caption = f"position {int(views.batch.positions[i])}, {source.width}x{source.height}{note}"
    return tile(source, caption, side, outlines=outlines)


def mask_tiles(views: Views, plan: MaskPlan, i: int, g: int, grid: int, strides: Sequence[int]) -> list[Image.Image]:
    """Return 2 + L tiles of one global crop. Other crops of the image that the predictor sees are outlined on the first."""
    pixels = views.pixels(g, i)
    outlines, suffix = _partners(views, plan, i, g)
    seen = to_picture(np.where(_cells(plan.context[i, g], grid, 1, len(pixels)), pixels, 0.5))
    tiles = [
        tile(to_picture(pixels), f"global {g}{suffix}", GLOBAL_SIDE, outlines=outlines),
        tile(seen, f"context: {plan.context.shape[-1]} of {grid**2} tokens", GLOBAL_SIDE),
    ]
    tinted = 0.35 * pixels + 0.65 * QUERY_COLOUR
    for level, (stride, queries) in enumerate(zip(strides, plan.queries, strict=True)):
        caption = f"level {level}: {queries.shape[-1]} of {level_grid(grid, stride) ** 2} cells"
        cells = _cells(queries[i, g], grid, stride, len(pixels))
        tiles.append(tile(to_picture(np.where(cells, tinted, pixels)), caption, GLOBAL_SIDE))
    return tiles


def _partners(views: Views, plan: MaskPlan, i: int, g: int) -> tuple[list[Outline], str]:
    """Return outlines of the crops that global `g` is predicted from, in its own coordinates, and the end of its caption."""
    if plan.partners is None:
        return [], ""
    partners = plan.partners[i, g].nonzero().flatten().tolist()
    boxes = views.batch.boxes[i].cpu().view(-1, 2, 2)  # [V, corner, y x]
    within = (boxes - boxes[g, 0]) / (boxes[g, 1] - boxes[g, 0])
    if views.batch.flips[i, g]:
        within[..., 1] = 1 - within[:, [1, 0], 1]
    outlines: list[Outline] = [(within[v].flatten().tolist(), views.colour(v), False) for v in partners]
    return outlines, f" from {views.name(partners[0])}" if len(partners) == 1 else f" and {len(partners)} locals"


def _cells(chosen: torch.Tensor, grid: int, stride: int, size: int) -> np.ndarray:
    """Return `[size, size, 1] bool`: the pixels of the chosen cells of a level."""
    side = level_grid(grid, stride)
    cells = torch.zeros(side * side, dtype=torch.bool)
    cells[chosen.cpu()] = True
    return np.kron(cells.view(side, side).numpy(), np.ones((stride * (size // grid),) * 2, dtype=bool))[:size, :size, None]


def feature_colours(encoder: MultiCropEncoder, crops: torch.Tensor) -> np.ndarray:
    """`[n, 3, S, S] -> [n, g, g, 3]`, 0..1: three principal components of all tokens, each from its 1st to 99th percentile."""
    with torch.inference_mode():
        flat = encoder([(crops, None)])[0].tokens.float().flatten(0, 1).cpu()
    centred = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    scores = torch.nn.functional.pad(centred @ axes.T, (0, 3 - len(axes)))
    low, high = (torch.quantile(scores, share, dim=0) for share in (0.01, 0.99))
    side = crops.shape[-1] // encoder.patch_size
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(len(crops), side, side, 3).numpy()


def neighbour_tiles(row: "Neighbours") -> list[Image.Image]:
    """Return a validation image, then its nearest training images: green with the same label, else red, gray without labels."""
    tiles = []
    for number, (encoded, label, caption) in enumerate(zip(row.pictures, row.labels, row.captions, strict=True)):
        colour: str | tuple[int, ...] = INK
        if number and label != UNLABELLED:
            colour = "#2a8f2a" if label == row.labels[0] else "#d0403c"
        similarity = f"{row.similarities[number - 1]:.3f}" if number else ""
        framed = ImageOps.expand(_fit(open_picture(encoded), NEIGHBOUR_SIDE - 6), 3, colour)
        tiles.append(tile(framed, f"{caption}\n{similarity}", NEIGHBOUR_SIDE, colour))
    return tiles


def open_picture(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def to_picture(pixels: np.ndarray) -> Image.Image:
    """`[H, W, 3]` in 0..1."""
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture scaled to a longer side of `side` pixels. Enlarged pixels stay squares."""
    enlarged = max(picture.size) < side
    return ImageOps.contain(picture, (side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


@cache
def _font() -> Any:
    return ImageFont.load_default(FONT_SIZE)


def _shorten(text: str, width: int) -> str:
    """Return the text without control characters, cut to a width in pixels."""
    text = printable(text)
    while _font().getlength(text) > width:
        text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}"
    return text


def tile(
    picture: Image.Image, caption: str, side: int, colour: str | tuple[int, ...] = INK, outlines: Iterable[Outline] = ()
) -> Image.Image:
    """Return the picture, fitted into a square of `side` pixels, under its caption of one or more lines."""
    picture = _fit(picture, side)
    canvas = ImageDraw.Draw(picture)
    for box, line_colour, dashed in outlines:
        y0, x0, y1, x1 = np.multiply(box, [picture.height, picture.width] * 2) - [0, 0, 1, 1]
        for start, end in pairwise(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])):
            count = max(1, round(np.abs(end - start).sum() / DASH)) if dashed else 1
            for n in range(count):
                dash = [start + (end - start) * part / count for part in (n, n + (0.6 if dashed else 1))]
                canvas.line([tuple(point) for point in dash], fill=line_colour, width=2)
    lines = caption.split("\n")
    top = CAPTION + LINE * (len(lines) - 1)
    captioned = Image.new("RGBA", (side, side + top), CLEAR)
    captioned.paste(picture, ((side - picture.width) // 2, top + (side - picture.height) // 2))
    for number, line in enumerate(lines):
        place = (side / 2, CAPTION / 2 + LINE * number)
        ImageDraw.Draw(captioned).text(place, _shorten(line, side), fill=colour, font=_font(), anchor="mm")
    return captioned


def text_line(text: str) -> Image.Image:
    """Return a line of text as a picture."""
    text = printable(text)
    line = Image.new("RGBA", (round(_font().getlength(text)) + 2 * GAP, CAPTION), CLEAR)
    ImageDraw.Draw(line).text((GAP, CAPTION / 2), text, fill=INK, font=_font(), anchor="lm")
    return line


def join_rows(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Return rows of pictures below one another; the pictures of a row are centred vertically."""
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width + GAP for picture in row) for row in rows) - GAP
    sheet, y = Image.new("RGBA", (width, sum(heights) + GAP * (len(rows) - 1)), CLEAR), 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y + (height - picture.height) // 2))
            x += picture.width + GAP
        y += height + GAP
    return sheet


def save_rows(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Write rows of pictures as PNG, with a margin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ImageOps.expand(join_rows(rows), GAP, CLEAR).save(path)
