"""The picture of a replay: for each sample the source with its boxes, the crops, and the masks of the globals."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from train.output.drawing import draw_global_masks, draw_source, plt, to_picture
from train.replay import Replay

VIEW_COLOURS = plt.get_cmap("tab10").colors
SOURCE_INCHES, CROP_INCHES = 4.2, 1.5


def draw_sheet(path: Path, seen: Replay) -> None:
    """One band for each sample. Each view has one colour, for its box and its title; a dashed box is a mirrored crop."""
    num_views, num_global = len(seen.batch.crops), seen.masks.context.shape[1]
    masks_per_row = num_global * (2 + len(seen.strides))
    width = SOURCE_INCHES + CROP_INCHES * max(num_views, masks_per_row)
    figure = plt.figure(figsize=(width, 4.1 * len(seen.rows)), layout="constrained")
    bands = np.atleast_1d(figure.subfigures(len(seen.rows), 1))
    for i, band in enumerate(bands):
        band.suptitle(seen.captions[i], fontsize=10)
        left, right = band.subfigures(1, 2, width_ratios=[SOURCE_INCHES, width - SOURCE_INCHES])
        above, below = right.subfigures(2, 1)
        source = Image.open(io.BytesIO(seen.dataset.index.encoded(seen.rows[i]))).convert("RGB")
        draw_source(axis := left.subplots(), source, seen.batch, i, [view_colour(v) for v in range(num_views)])
        axis.set_title(f"source, {source.width}x{source.height} (dashed: mirrored)", fontsize=9)
        sizes = [1.0 if v < num_global else 0.7 for v in range(num_views)]
        draw_views(above.subplots(1, num_views, width_ratios=sizes, squeeze=False)[0], seen, i)
        axes = below.subplots(1, masks_per_row, squeeze=False)[0]
        for g, row in enumerate(axes.reshape(num_global, -1).tolist()):
            draw_global_masks(
                row, seen.batch, seen.masks, i, g, seen.grid, seen.strides, seen.dataset.mean, seen.dataset.std
            )
    for axis in figure.get_axes():
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_views(axes: np.ndarray, seen: Replay, i: int) -> None:
    num_global = seen.masks.context.shape[1]
    for v, axis in enumerate(axes):
        axis.imshow(to_picture(seen.batch.crops[v][i], seen.dataset.mean, seen.dataset.std))
        kind = f"global {v}" if v < num_global else f"local {v - num_global}"
        mirrored = "\nmirrored" if bool(seen.batch.flips[i, v]) else "\n"
        axis.set_title(kind + mirrored, fontsize=9, color=view_colour(v))


def view_colour(view: int) -> tuple[float, ...]:
    return VIEW_COLOURS[view % len(VIEW_COLOURS)]
