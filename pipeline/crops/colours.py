"""The colours of one crop on the CPU, compiled: jitter and solarisation, in fixed point."""

import math

import numpy as np

from pipeline.crops.vectors import BLOCK, FACTOR, LOWER, MATRIX, RAISE, ROUNDING, SHIFT, TOP, brighten, compiled, mix

GRAY = (0.299, 0.587, 0.114)  # the luma of ITU-R BT.601, which torchvision, Pillow and DALI share
# RGB to YIQ and back as DALI rounds them, so that both backends turn hues alike.
TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311))
FROM_YIQ = ((1.0, 0.956, 0.621), (1.0, -0.272, -0.647), (1.0, -1.107, 1.705))
MOST = 256 * BLOCK  # pixels of one call of `brighten`
LARGEST = (1 << 15) - 1  # int16


@compiled
def twist_colours(crop: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> None:
    """Brightness, contrast around the mean gray, saturation and hue (degrees), in this order, in place."""
    plane = crop.size // 3
    whole = plane - plane % BLOCK
    flat, rest = crop.reshape(3, plane), np.zeros((3, BLOCK), np.uint8)
    # What is left of whole vectors is put into one of its own.
    rest[:, : plane - whole] = flat[:, whole:]
    bits = fraction_bits(brightness, 7, 8, 2 * LARGEST)
    factor = min(int(brightness * (1 << bits + 8) + 0.5), 2 * LARGEST + 1)
    mean = 0.0
    for c in range(3):
        total = brighten(rest[c], 0, 1, factor, bits)
        for first in range(0, whole, MOST):
            total += brighten(flat[c], first, min(MOST, whole - first) // BLOCK, factor, bits)
        mean += GRAY[c] * total / plane
    numbers = mixture(contrast, mean, colour_matrix(saturation, hue))
    mix(crop.reshape(crop.size), 0, plane, whole // BLOCK, numbers)
    mix(rest.reshape(rest.size), 0, BLOCK, 1, numbers)
    flat[:, whole:] = rest[:, : plane - whole]


@compiled
def mixture(contrast: float, mean: float, matrix: np.ndarray) -> np.ndarray:
    """The numbers of `mix`, `int16`, with as many bits of fraction as there is room for."""
    numbers = np.empty(MATRIX + 9, np.int16)
    bits = fraction_bits(contrast, 5, 8, LARGEST)
    numbers[FACTOR] = min(int(contrast * (1 << bits + 8) + 0.5), LARGEST)
    numbers[SHIFT] = min(max(math.floor(mean * (1 - contrast) * (1 << bits) + 0.5), -LARGEST), LARGEST)
    numbers[TOP] = 255 << bits
    numbers[RAISE] = 7 - bits
    largest = 0.0
    for i in range(3):
        largest = max(largest, abs(matrix[i, 0]) + abs(matrix[i, 1]) + abs(matrix[i, 2]))
    bits = fraction_bits(largest, 4, 9, LARGEST - 64)
    numbers[LOWER] = bits
    numbers[ROUNDING] = (1 << bits >> 1) + 1  # and 1 for three sums that were rounded down
    for i in range(9):
        weight = math.floor(matrix[i // 3, i % 3] * (1 << bits + 9) + 0.5)
        numbers[MATRIX + i] = min(max(weight, -LARGEST), LARGEST)
    return numbers


@compiled
def fraction_bits(value: float, wanted: int, more: int, most: int) -> int:
    """The bits of fraction, `wanted` or less, with which `value` times another `2 ** more` is at most `most`."""
    bits = wanted
    while bits > 1 and value * (1 << bits + more) > most:
        bits -= 1
    return bits


@compiled
def colour_matrix(saturation: float, hue: float) -> np.ndarray:
    """`[3, 3] float64`: the chroma plane of YIQ turned by `hue` degrees and scaled by `saturation`, in RGB."""
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
    """Solarisation of `crop` `[3, S, S] uint8` in place: values from `threshold` on are inverted."""
    flat, least, white = crop.reshape(crop.size), np.uint8(threshold), np.uint8(255)
    for i in range(flat.size):
        value = flat[i]
        flat[i] = white - value if value >= least else value
