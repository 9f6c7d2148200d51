"""Every random parameter of the augmentations, drawn by position: never dependent on batch size, rank or thread count."""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.plan import DRAW_STREAM, random_words

ATTEMPTS = 10  # of torchvision's RandomResizedCrop before it falls back to a central crop
WORDS = 32  # per position and view: a multiple of Philox's block of four
BLOCKS = WORDS // 4


@dataclass(frozen=True)
class ViewRecipe:
    """How one crop of an image is made. Scales are shares of the image's area, ratios are width / height.

    `scale=None` is the central square of `centre_ratio` of the shorter side, with no randomness at all. Jitter strengths are
    those of `torchvision.transforms.ColorJitter`; `hue` is in turns of the colour circle, blur sigmas in pixels of the crop.
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
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0


@dataclass(frozen=True)
class Draws:
    """The parameters of V views of B positions.

    `boxes`: `[B, V, 4] float32`, y0, x0, y1, x1 in pixels of the source. `flips`, `twists` (colour ops needed), `blurs`,
    `solarizes`: `[B, V] bool`. `colours`: `[B, V, 4] float32`, factors of brightness, contrast and saturation, and hue in
    degrees (identity where no jitter was drawn; saturation 0 is grayscale). `sigmas`: `[B, V] float32`.
    """

    boxes: np.ndarray
    flips: np.ndarray
    twists: np.ndarray
    colours: np.ndarray
    blurs: np.ndarray
    sigmas: np.ndarray
    solarizes: np.ndarray


def draw(
    recipes: tuple[ViewRecipe, ...], seed: int, epoch: int, start: int, heights: np.ndarray, widths: np.ndarray
) -> Draws:
    """Draw for the positions `start..start + B` whose images are `heights x widths` (`[B]` int, pixels)."""
    views = [_draw_view(r, v, seed, epoch, start, heights, widths) for v, r in enumerate(recipes)]
    return Draws(**{name: np.stack([view[name] for view in views], axis=1) for name in views[0]})


def _draw_view(
    recipe: ViewRecipe, view: int, seed: int, epoch: int, start: int, heights: np.ndarray, widths: np.ndarray
) -> dict[str, np.ndarray]:
    count = len(heights)
    words = random_words(seed, epoch, (start * BLOCKS, view), DRAW_STREAM, count * WORDS)
    u = (words >> np.uint64(11)).reshape(count, WORDS) * 2.0**-53  # [B, WORDS] float64 in [0, 1)
    if recipe.scale is None:
        boxes = centre_boxes(heights, widths, recipe.centre_ratio)
    else:
        boxes = _resized_crop_boxes(recipe.scale, recipe.ratio, u[:, :22], heights, widths)
    jittered, gray = u[:, 23] < recipe.jitter_prob, u[:, 24] < recipe.gray_prob
    strengths = np.array([recipe.brightness, recipe.contrast, recipe.saturation])
    low, high = np.maximum(1 - strengths, 0), 1 + strengths
    factors = low + (high - low) * u[:, 25:28]
    hue = 360 * recipe.hue * (2 * u[:, 28:29] - 1)
    colours = np.where(jittered[:, None], np.concatenate([factors, hue], 1), [1.0, 1.0, 1.0, 0.0])
    colours[gray, 2] = 0.0
    sigma_low, sigma_high = recipe.blur_sigma
    return {
        "boxes": boxes.astype(np.float32),
        "flips": u[:, 22] < recipe.flip_prob,
        "twists": jittered | gray,
        "colours": colours.astype(np.float32),
        "blurs": u[:, 29] < recipe.blur_prob,
        "sigmas": (sigma_low + (sigma_high - sigma_low) * u[:, 30]).astype(np.float32),
        "solarizes": u[:, 31] < recipe.solarize_prob,
    }


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
