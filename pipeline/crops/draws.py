"""Every random parameter of the crops, drawn by position: never dependent on batch size, rank or thread count."""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.crops import augment
from pipeline.crops.augment import ViewRecipe, draw_columns
from pipeline.plan import DRAW_STREAM, random_words

ATTEMPTS = 10  # of torchvision's RandomResizedCrop before it falls back to a central crop
BOX_WORDS = 2 * ATTEMPTS + 2
BLOCKS = -(-(BOX_WORDS + 1 + augment.WORDS) // 4)
WORDS = 4 * BLOCKS  # per position and view: whole blocks of Philox, which are of four

# What is drawn for each crop, in this order: its box in the source, whether it is mirrored, and what is done to its pixels.
PARAMETERS = ("y0", "x0", "y1", "x1", "flip", *augment.COLUMNS)
FLIP, PIXEL_PARAMETERS = 4, 5  # the places of the flip, and of the first of the last group


@dataclass(frozen=True)
class Draws:
    """The parameters of V views of B positions. `values`: `[V, B, P] float32`, in the order of PARAMETERS; boxes in pixels."""

    values: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """`[B, V, 4] float32`: y0, x0, y1, x1 in pixels of the source."""
        return self.values[..., :4].swapaxes(0, 1)

    @property
    def flips(self) -> np.ndarray:
        """`[B, V] bool`"""
        return self["flip"] != 0

    def __getitem__(self, name: str) -> np.ndarray:
        """`[B, V] float32`: one of PARAMETERS."""
        return self.values[..., PARAMETERS.index(name)].T


def draw(
    recipes: tuple[ViewRecipe, ...], seed: int, epoch: int, start: int, heights: np.ndarray, widths: np.ndarray
) -> Draws:
    """Draw for the positions `start..start + B` whose images are `heights x widths` (`[B]` int, pixels)."""
    values = np.empty((len(recipes), len(heights), len(PARAMETERS)), np.float32)
    for recipe in dict.fromkeys(recipes):
        views = [v for v, other in enumerate(recipes) if other == recipe]
        values[views] = _draw_views(recipe, views, seed, epoch, start, heights, widths)
    return Draws(values)


def _draw_views(
    recipe: ViewRecipe, views: list[int], seed: int, epoch: int, start: int, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """`[len(views), B, P]`: of the views that share a recipe, at once."""
    count = len(heights)
    words = [random_words(seed, epoch, (start * BLOCKS, view), DRAW_STREAM, count * WORDS) for view in views]
    u = (np.concatenate(words) >> np.uint64(11)).reshape(-1, WORDS) * 2.0**-53  # [V * B, WORDS] float64 in [0, 1)
    heights, widths = np.tile(heights, len(views)), np.tile(widths, len(views))
    if recipe.scale is None:
        boxes = centre_boxes(heights, widths, recipe.centre_ratio)
    else:
        boxes = _resized_crop_boxes(recipe.scale, recipe.ratio, u[:, :BOX_WORDS], heights, widths)
    flips = u[:, BOX_WORDS] < recipe.flip_prob
    columns = draw_columns(recipe, u[:, BOX_WORDS + 1 :])
    return np.column_stack([boxes, flips, columns]).reshape(len(views), count, -1)


def _resized_crop_boxes(
    scale: tuple[float, float], ratio: tuple[float, float], u: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """`[B, 4]`: boxes as `torchvision.transforms.RandomResizedCrop.get_params` draws them, ten attempts at once."""
    area = (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS]) * (heights * widths)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first, rows = np.argmax(fits, axis=1), np.arange(len(u))
    w, h, found = w[rows, first], h[rows, first], fits[rows, first]
    y = np.floor(u[:, 2 * ATTEMPTS] * (heights - h + 1))
    x = np.floor(u[:, 2 * ATTEMPTS + 1] * (widths - w + 1))
    # The fallback: the largest central box whose ratio is allowed.
    whole = widths / heights
    w_back = np.where(whole > ratio[1], np.rint(heights * ratio[1]), widths)
    h_back = np.where(whole < ratio[0], np.rint(widths / ratio[0]), heights)
    w, h = np.where(found, w, w_back), np.where(found, h, h_back)
    y = np.where(found, y, (heights - h) // 2)
    x = np.where(found, x, (widths - w) // 2)
    return np.stack([y, x, y + h, x + w], axis=1)


def centre_boxes(heights: np.ndarray, widths: np.ndarray, centre_ratio: float) -> np.ndarray:
    """`[B, 4]`: the central square whose side is `centre_ratio` of the shorter side."""
    side = np.maximum(np.rint(np.minimum(heights, widths) * centre_ratio), 1)
    y, x = (heights - side) // 2, (widths - side) // 2
    return np.stack([y, x, y + side, x + side], axis=1)
