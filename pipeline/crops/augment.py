"""The settings of every crop, and the random parameters drawn for it.

Parameters are drawn by position in the epoch, so they never depend on the batch size, the rank or the number of threads.
CONTRIBUTING.md says what a new operation needs.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline import defaults
from pipeline.order import DRAW_STREAM, random_words

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # the luma of ITU-R BT.601, as torchvision, Pillow and DALI use it
SOLARIZE_THRESHOLD = 128  # as in DINO
PerGlobal = float | tuple[float, ...]

# The parameters of one crop, in this order everywhere: its box in the source image (pixels); 1 to mirror it; 1 if any of the next
# four, three colour factors and the hue in degrees, is not the identity (saturation 0 is grayscale); the blur's sigma in pixels
# of the crop (0: no blur); 1 to solarise.
PARAMETERS = range(12)
Y0, X0, Y1, X1, FLIP, TWIST, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA, SOLARIZE = PARAMETERS

ATTEMPTS = 10  # of torchvision's RandomResizedCrop before it falls back to a central crop
# Random numbers per crop: an area and an aspect ratio for each attempt, and twelve others. Philox makes blocks of four words.
WORDS = 2 * ATTEMPTS + 12
BLOCKS = WORDS // 4


@dataclass(frozen=True)
class Augmentation:
    """The settings shared by all crops. `mean` and `std` normalise the result, in 0..1; sigmas are in pixels of the crop.

    `global_blur_prob` and `solarize_prob`: one number for each global crop, the last one for any further, or one for all.
    """

    flip_prob: float = defaults.FLIP_PROB
    color_jitter_prob: float = defaults.COLOR_JITTER_PROB
    gray_prob: float = defaults.GRAY_PROB
    global_blur_prob: PerGlobal = defaults.GLOBAL_BLUR_PROB
    local_blur_prob: float = defaults.LOCAL_BLUR_PROB
    blur_sigma: tuple[float, float] = defaults.BLUR_SIGMA
    solarize_prob: PerGlobal = defaults.SOLARIZE_PROB
    mean: tuple[float, float, float] = defaults.IMAGENET_MEAN
    std: tuple[float, float, float] = defaults.IMAGENET_STD

    def view(self, size: int, scale: tuple[float, float], jitter: float, number: int | None) -> "ViewRecipe":
        """Build the recipe of global crop `number`, or of a local crop (None).

        A jitter strength s means brightness and contrast s, saturation s / 2 and hue s / 4.
        """
        return ViewRecipe(
            size, scale, flip_prob=self.flip_prob, gray_prob=self.gray_prob, blur_sigma=self.blur_sigma,
            jitter_prob=self.color_jitter_prob if jitter > 0 else 0.0,
            brightness=jitter, contrast=jitter, saturation=jitter / 2, hue=jitter / 4,
            blur_prob=self.local_blur_prob if number is None else _of_global(self.global_blur_prob, number),
            solarize_prob=0.0 if number is None else _of_global(self.solarize_prob, number),
        )  # fmt: skip


def _of_global(values: PerGlobal, number: int) -> float:
    return values[min(number, len(values) - 1)] if isinstance(values, tuple) else values


@dataclass(frozen=True)
class ViewRecipe:
    """How one crop of an image is made. Scales are fractions of the image's area, ratios are width / height.

    `scale=None` is the central square of `centre_ratio` of the shorter side, without randomness. Jitter strengths are those of
    `torchvision.transforms.ColorJitter`; `hue` is a fraction of the colour circle, blur sigmas are in pixels of the crop.
    """

    size: int
    scale: tuple[float, float] | None
    centre_ratio: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.0
    jitter_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = defaults.BLUR_SIGMA
    solarize_prob: float = 0.0


def draw_parameters(
    recipes: tuple[ViewRecipe, ...], seed: int, epoch: int, start: int, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Return `[V, B, P] float32`, as in PARAMETERS, for positions `start..start + B` of images with `[B]` int sides in pixels."""
    values = np.empty((len(recipes), len(heights), len(PARAMETERS)), np.float32)
    for recipe in dict.fromkeys(recipes):  # views that share a recipe are drawn at once
        views = [v for v, other in enumerate(recipes) if other == recipe]
        words = [random_words(seed, epoch, (start * BLOCKS, v), DRAW_STREAM, len(heights) * WORDS) for v in views]
        u = (np.concatenate(words) >> np.uint64(11)).reshape(-1, WORDS) * 2.0**-53  # float64 in [0, 1)
        drawn = _draw_views(recipe, u, np.tile(heights, len(views)), np.tile(widths, len(views)))
        values[views] = drawn.reshape(len(views), len(heights), -1)
    return values


def _draw_views(recipe: ViewRecipe, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return `[n, P] float64` from the uniform numbers `u` `[n, WORDS]`. Their order decides what every seed draws."""
    _, _, flip, jitter, gray, *factors, hue, blur, sigma, solarize = u[:, 2 * ATTEMPTS :].T
    box = (_central_boxes if recipe.scale is None else _random_boxes)(recipe, u, heights, widths)
    jittered, grayed = jitter < recipe.jitter_prob, gray < recipe.gray_prob
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    colours = [np.where(jittered, _between(max(1 - s, 0), 1 + s, f), 1.0) for s, f in zip(strengths, factors, strict=True)]
    colours[2][grayed] = 0.0
    hues = np.where(jittered, 360 * recipe.hue * (2 * hue - 1), 0.0)
    sigmas = np.where(blur < recipe.blur_prob, _between(*recipe.blur_sigma, sigma), 0.0)
    flips, solarized = flip < recipe.flip_prob, solarize < recipe.solarize_prob
    return np.column_stack([*box, flips, jittered | grayed, *colours, hues, sigmas, solarized])


def _between(low: float, high: float, u: np.ndarray) -> np.ndarray:
    return low + (high - low) * u


def _central_boxes(recipe: ViewRecipe, _: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return y0, x0, y1, x1 of the central square whose side is `centre_ratio` of the shorter side."""
    side = np.maximum(np.rint(np.minimum(heights, widths) * recipe.centre_ratio), 1)
    y, x = (heights - side) // 2, (widths - side) // 2
    return y, x, y + side, x + side


def _random_boxes(recipe: ViewRecipe, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return y0, x0, y1, x1 as `torchvision.transforms.RandomResizedCrop.get_params` draws them, all attempts at once."""
    assert recipe.scale is not None
    low, high = recipe.ratio
    area = _between(*recipe.scale, u[:, :ATTEMPTS]) * (heights * widths)[:, None]
    aspect = np.exp(_between(math.log(low), math.log(high), u[:, ATTEMPTS : 2 * ATTEMPTS]))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first, rows = np.argmax(fits, axis=1), np.arange(len(u))
    w, h, any_fits = w[rows, first], h[rows, first], fits[rows, first]
    y = np.floor(u[:, 2 * ATTEMPTS] * (heights - h + 1))
    x = np.floor(u[:, 2 * ATTEMPTS + 1] * (widths - w + 1))
    # The fallback: the largest central box whose ratio is allowed.
    image_ratio = widths / heights
    w = np.where(any_fits, w, np.where(image_ratio > high, np.rint(heights * high), widths))
    h = np.where(any_fits, h, np.where(image_ratio < low, np.rint(widths / low), heights))
    y = np.where(any_fits, y, (heights - h) // 2)
    x = np.where(any_fits, x, (widths - w) // 2)
    return y, x, y + h, x + w
