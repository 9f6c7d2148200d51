"""Colour jitter and solarisation of one crop on the CPU, compiled, in 16-bit fixed point."""

import math

import numpy as np

from pipeline.crops.augment import GRAY_WEIGHTS
from pipeline.crops.vectors import BLOCK, FACTOR, LOWER, MATRIX, RAISE, ROUNDING, SHIFT, TOP, brighten, compiled, mix

# RGB to YIQ and back, rounded as in DALI, so that both backends turn hues alike.
TO_YIQ = (GRAY_WEIGHTS, (0.596, -0.274, -0.321), (0.211, -0.523, 0.311))
FROM_YIQ = ((1.0, 0.956, 0.621), (1.0, -0.272, -0.647), (1.0, -1.107, 1.705))
MAX_PIXELS = 256 * BLOCK  # of one call of `brighten`, whose sums would overflow beyond
MAX_INT16 = (1 << 15) - 1


@compiled
def twist_colours(crop: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> None:
    """Change `crop` `[3, S, S] uint8` in place: brightness, contrast around the mean gray, saturation, hue (degrees)."""
    plane = crop.size // 3
    full = plane - plane % BLOCK
    # The pixels after the last full vector are padded to one vector of their own.
    flat, rest = crop.reshape(3, plane), np.zeros((3, BLOCK), np.uint8)
    rest[:, : plane - full] = flat[:, full:]
    # Brightness first: contrast pivots on the mean gray of the result.
    bits = fraction_bits(brightness, 7, 8, 2 * MAX_INT16)
    factor = min(int(brightness * (1 << bits + 8) + 0.5), 2 * MAX_INT16 + 1)
    mean = 0.0
    for c in range(3):
        total = brighten(rest[c], 0, 1, factor, bits)
        for first in range(0, full, MAX_PIXELS):
            total += brighten(flat[c], first, min(MAX_PIXELS, full - first) // BLOCK, factor, bits)
        mean += GRAY_WEIGHTS[c] * total / plane
    # Contrast, saturation and hue in one pass.
    numbers = mix_numbers(contrast, mean, colour_matrix(saturation, hue))
    mix(crop.reshape(crop.size), 0, plane, full // BLOCK, numbers)
    mix(rest.reshape(rest.size), 0, BLOCK, 1, numbers)
    flat[:, full:] = rest[:, : plane - full]


@compiled
def mix_numbers(contrast: float, mean: float, matrix: np.ndarray) -> np.ndarray:
    """Return the `numbers` argument of `mix`, `int16`, with as many fraction bits as fit."""
    numbers = np.empty(MATRIX + 9, np.int16)
    bits = fraction_bits(contrast, 5, 8, MAX_INT16)
    numbers[FACTOR] = min(int(contrast * (1 << bits + 8) + 0.5), MAX_INT16)
    numbers[SHIFT] = min(max(math.floor(mean * (1 - contrast) * (1 << bits) + 0.5), -MAX_INT16), MAX_INT16)
    numbers[TOP] = 255 << bits
    numbers[RAISE] = 7 - bits
    max_sum = 0.0  # of a row, which bounds its sum of products
    for i in range(3):
        max_sum = max(max_sum, abs(matrix[i, 0]) + abs(matrix[i, 1]) + abs(matrix[i, 2]))
    bits = fraction_bits(max_sum, 4, 9, MAX_INT16 - 64)
    numbers[LOWER] = bits
    numbers[ROUNDING] = (1 << bits >> 1) + 1  # one half, plus 1 because three products were rounded down
    for i in range(9):
        weight = math.floor(matrix[i // 3, i % 3] * (1 << bits + 9) + 0.5)
        numbers[MATRIX + i] = min(max(weight, -MAX_INT16), MAX_INT16)
    return numbers


@compiled
def fraction_bits(value: float, max_bits: int, more: int, limit: int) -> int:
    """Return the most fraction bits, 1 to `max_bits`, with which `value` times `2 ** (bits + more)` is at most `limit`."""
    bits = max_bits
    while bits > 1 and value * (1 << bits + more) > limit:
        bits -= 1
    return bits


@compiled
def colour_matrix(saturation: float, hue: float) -> np.ndarray:
    """Return `[3, 3] float64` over RGB that turns the chroma plane of YIQ by `hue` degrees and scales it by `saturation`."""
    cosine, sine = saturation * math.cos(math.radians(hue)), saturation * math.sin(math.radians(hue))
    matrix = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            in_phase = cosine * TO_YIQ[1][j] + sine * TO_YIQ[2][j]
            quadrature = cosine * TO_YIQ[2][j] - sine * TO_YIQ[1][j]
            matrix[i, j] = TO_YIQ[0][j] + FROM_YIQ[i][1] * in_phase + FROM_YIQ[i][2] * quadrature
    return matrix


@compiled
def invert_above(crop: np.ndarray, threshold: int) -> None:
    """Solarise `crop` `[3, S, S] uint8` in place: invert the values from `threshold` on."""
    flat, lowest, white = crop.reshape(crop.size), np.uint8(threshold), np.uint8(255)
    for i in range(flat.size):
        value = flat[i]
        flat[i] = white - value if value >= lowest else value
