"""What is done to a crop's pixels once it is cut: the settings, their random numbers, and the operations on CPU and GPU.

To add an operation: its settings in `Augmentation` (with their keys in `train/config/schema.py`) and in `ViewRecipe`, its columns
in COLUMNS and `draw_columns`, and one step each in `apply` and `apply_dali`, which must do the same to within a rounding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nvidia.dali import fn, types

from pipeline.crops.colours import invert_above, twist_colours
from pipeline.crops.kernels import blur
from pipeline.crops.vectors import compiled
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from nvidia.dali.types import DataNode

THRESHOLD = 128  # of solarisation, as torchvision's users write it
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as torchvision and DALI use
SOLARIZE_TABLE = [value if value < THRESHOLD else 255 - value for value in range(256)]
PerGlobal = float | tuple[float, ...]


@dataclass(frozen=True)
class Augmentation:
    """Settings of all crops. `mean` and `std` normalise the result, in 0..1; sigmas are in pixels of the crop.

    `global_blur_prob` and `solarize_prob`: one number for each global crop, the last one for any further, or one for all.
    """

    flip_prob: float = 0.5
    color_jitter_prob: float = 0.8
    gray_prob: float = 0.2
    global_blur_prob: PerGlobal = (1.0, 0.1)
    local_blur_prob: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: PerGlobal = (0.0, 0.2)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def view(self, size: int, scale: tuple[float, float], jitter: float, number: int | None) -> "ViewRecipe":
        """The recipe of global crop `number`, or of a local one (None).

        A jitter strength s means brightness and contrast s, saturation s / 2 and hue s / 4.
        """
        return ViewRecipe(
            size,
            scale,
            flip_prob=self.flip_prob,
            jitter_prob=self.color_jitter_prob if jitter > 0 else 0.0,
            brightness=jitter,
            contrast=jitter,
            saturation=jitter / 2,
            hue=jitter / 4,
            gray_prob=self.gray_prob,
            blur_prob=self.local_blur_prob if number is None else _of_global(self.global_blur_prob, number),
            blur_sigma=self.blur_sigma,
            solarize_prob=0.0 if number is None else _of_global(self.solarize_prob, number),
        )


def _of_global(values: PerGlobal, number: int) -> float:
    return values[min(number, len(values) - 1)] if isinstance(values, tuple) else values


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


# What is drawn for a crop, in this order. `twist`: 1 where the four after it, factors and degrees, are not the identity;
# `saturation` 0 is grayscale; `sigma` 0: no blur; `solarize`: 0 or 1.
COLUMNS = ("twist", "brightness", "contrast", "saturation", "hue", "sigma", "solarize")
TWIST, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA, SOLARIZE = range(len(COLUMNS))
WORDS = 9  # random numbers that `draw_columns` uses; more of them make another stream of all draws


def draw_columns(recipe: ViewRecipe, u: np.ndarray) -> np.ndarray:
    """`[B, 7] float64`, in the order of COLUMNS, from `[B, WORDS] float64` in 0..1."""
    jittered, gray = u[:, 0] < recipe.jitter_prob, u[:, 1] < recipe.gray_prob
    strengths = np.array([recipe.brightness, recipe.contrast, recipe.saturation])
    low, high = np.maximum(1 - strengths, 0), 1 + strengths
    factors = low + (high - low) * u[:, 2:5]
    hue = 360 * recipe.hue * (2 * u[:, 5:6] - 1)
    colours = np.where(jittered[:, None], np.concatenate([factors, hue], 1), [1.0, 1.0, 1.0, 0.0])
    colours[gray, 2] = 0.0
    sigma_low, sigma_high = recipe.blur_sigma
    sigmas = np.where(u[:, 6] < recipe.blur_prob, sigma_low + (sigma_high - sigma_low) * u[:, 7], 0.0)
    return np.column_stack([jittered | gray, colours, sigmas, u[:, 8] < recipe.solarize_prob])


@compiled
def apply(crop: np.ndarray, values: np.ndarray) -> None:
    """On the CPU: change `crop` `[3, S, S] uint8` in place by `values` `[7] float32`, in the order of COLUMNS."""
    if values[TWIST] != 0:
        twist_colours(crop, values[BRIGHTNESS], values[CONTRAST], values[SATURATION], values[HUE])
    if values[SIGMA] > 0:
        blur(crop, values[SIGMA])
    if values[SOLARIZE] != 0:
        invert_above(crop, THRESHOLD)


def apply_dali(crop: "DataNode", values: "DataNode", recipe: ViewRecipe) -> "DataNode":
    """The same in DALI's operators, for the GPU: `crop` is `[S, S, 3] uint8`, `values` as above.

    A conditional costs less than an identity pass over the pixels, and none is built for what a recipe never does.
    """
    if recipe.jitter_prob > 0 or recipe.gray_prob > 0:
        if values[TWIST] > 0:
            crop = _twist_dali(crop, values)
    if recipe.blur_prob > 0:
        if values[SIGMA] > 0:
            crop = fn.gaussian_blur(crop, sigma=values[SIGMA])
    if recipe.solarize_prob > 0:
        if values[SOLARIZE] > 0:
            crop = fn.lookup_table(crop, keys=list(range(256)), values=SOLARIZE_TABLE, dtype=types.UINT8)
    return crop


def _twist_dali(crop: "DataNode", values: "DataNode") -> "DataNode":
    """ColorJitter in the fixed order brightness, contrast, saturation, hue.

    As in torchvision, contrast pivots on the mean gray of the brightened (and clipped) crop.
    """
    crop = fn.brightness_contrast(crop, brightness=values[BRIGHTNESS])
    # Named arguments must be on the CPU, so the pivot, which is computed on the device, is added. GPU color_space_conversion
    # would launch one kernel for each sample.
    weights = types.Constant(np.array(GRAY_WEIGHTS, np.float32)) * (1 - values[CONTRAST])
    pivot = fn.reductions.sum(fn.reductions.mean(crop, axes=(0, 1)) * weights)
    crop = fn.brightness_contrast(crop, contrast=values[CONTRAST], contrast_center=0.0, dtype=types.FLOAT) + pivot
    crop = fn.cast(crop, dtype=types.UINT8)  # saturates
    return fn.color_twist(crop, saturation=values[SATURATION], hue=values[HUE])
