"""Resize, blur and colours of one crop on the CPU, compiled.

Crops are planar, in 8 bits. A pass is a weighted sum of vectors in fixed point (`pipeline/crops/vectors.py`): the same input
gives the same bytes on every machine. `kernel.cu` repeats the passes for a GPU, from the same numbers of the same functions.
"""

import math

import numpy as np

from pipeline.crops.augment import GRAY_WEIGHTS, X0, X1, Y0, Y1
from pipeline.crops.vectors import BLOCK, LANES, WEIGHT_BITS, brighten, compiled, mix, transpose, weigh, weigh_fast

ONE = 1 << WEIGHT_BITS
SMALL_KERNEL_TAPS = 13  # of a blur; up to here sums in 16 bits are within 0.02 grey levels of exact ones
# RGB to YIQ and back, rounded as in DALI, so that both backends turn hues alike.
TO_YIQ = (GRAY_WEIGHTS, (0.596, -0.274, -0.321), (0.211, -0.523, 0.311))
FROM_YIQ = ((1.0, 0.956, 0.621), (1.0, -0.272, -0.647), (1.0, -1.107, 1.705))
MAX_PIXELS = 256 * BLOCK  # of one call of `brighten`, whose sums would overflow beyond
MAX_INT16 = (1 << 15) - 1


@compiled
def cut_box(values: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """Return y0, x0, y1, x1 of a crop, cut off at its image, whose size an index may have wrong: nobody reads beyond."""
    y1, x1 = min(int(values[Y1]), height), min(int(values[X1]), width)
    return min(int(values[Y0]), y1 - 1), min(int(values[X0]), x1 - 1), y1, x1


@compiled
def num_taps(length: int, size: int) -> int:
    """Return the weights of each pixel in a resize from `length` to `size`."""
    return min(math.ceil(2 * max(length / size, 1.0)), length)


@compiled
def filter_table(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangle filter of a resize from `length` to `size`, antialiased as in Pillow and torchvision.

    `starts` `[size] int64` and `weights` `[size, taps] int16`, with rows padded with zeros: a fixed number of taps makes the loop
    predictable.
    """
    scale = length / size
    support = max(scale, 1.0)
    taps = num_taps(length, size)
    starts, weights, exact = np.empty(size, np.int64), np.empty((size, taps), np.int16), np.empty(taps)
    for i in range((size + 1) // 2):
        centre, mirror = (i + 0.5) * scale, size - 1 - i
        start = min(max(int(centre - support + 0.5), 0), length - taps)
        for k in range(taps):
            exact[k] = max(support - abs(start + k + 0.5 - centre), 0.0)
        round_weights(weights[i], exact)
        starts[i] = start
        if mirror > i:
            starts[mirror] = length - taps - start
            for k in range(taps):
                weights[mirror, taps - 1 - k] = weights[i, k]
    return starts, weights


@compiled
def round_weights(weights: np.ndarray, exact: np.ndarray) -> None:
    """Set `weights` `int16` to `exact` `float64` >= 0 in fixed point, with a sum of 1 (a single weight of 1 does not fit)."""
    unit = ONE / exact.sum()
    rest, largest = ONE, 0  # what rounding leaves goes to the largest weight
    for k in range(len(exact)):
        weight = int(exact[k] * unit + 0.5)
        weights[k] = min(weight, ONE - 1)
        rest -= weight
        if exact[k] > exact[largest]:
            largest = k
    weights[largest] = min(weights[largest] + rest, ONE - 1)


@compiled
def resize(out: np.ndarray, image: np.ndarray, y0: int, x0: int, y1: int, x1: int, flip: bool) -> None:
    """Resize a box of `image` `[H, W, 3] uint8` to `out` `[3, S, S] uint8`, mirrored left to right with `flip`.

    Nothing outside the box is read.
    """
    size, height, width = out.shape[1], y1 - y0, x1 - x0
    y_starts, y_weights = filter_table(height, size)
    x_starts, x_weights = filter_table(width, size)
    y_taps, x_taps = y_weights.shape[1], x_weights.shape[1]
    y_flat, x_flat = y_weights.reshape(y_weights.size), x_weights.reshape(x_weights.size)
    if width < BLOCK:  # pad a box that is narrower than a vector
        box = np.zeros((height, BLOCK, 3), np.uint8)
        box[:, :width] = image[y0:y1, x0:x1]
        image, y0, x0 = box, 0, 0
    step, length = 3 * image.shape[1], 3 * max(width, BLOCK)
    source = image.reshape(image.size)[y0 * step + 3 * x0 :]
    padded = np.empty((3, BLOCK, BLOCK), np.uint8) if size < BLOCK else out
    stride, result = padded.shape[1], padded.reshape(padded.size)
    rows, columns = np.empty(BLOCK * length, np.int16), np.empty(BLOCK * length, np.int16)
    made = np.empty(stride * LANES, np.uint8)
    for block in range(0, size, BLOCK):
        top = max(min(block, size - BLOCK), 0)  # the last block can overlap the one before it
        for r in range(BLOCK):  # each row is a weighted sum of source rows
            y = min(top + r, size - 1)
            for x in range(0, length, LANES):
                x = min(x, length - LANES)
                weigh(rows, r * length + x, source, y_starts[y] * step + x, step, y_flat, y * y_taps, y_taps)
        # Transposed, a vector holds one column of all rows, and a column of the result is a weighted sum of vectors again.
        for x in range(0, length, BLOCK // 2):
            x = min(x, length - BLOCK // 2)
            transpose(columns, x * BLOCK, BLOCK, rows, x, length)
        for x in range(size):
            to = size - 1 - x if flip else x
            weigh(made, to * LANES, columns, x_starts[x] * LANES, LANES, x_flat, x * x_taps, x_taps)
        for x in range(0, size, BLOCK):
            x = max(min(x, size - BLOCK), 0)
            for c in range(3):
                transpose(result, (c * stride + top) * stride + x, stride, made, x * LANES + c * BLOCK, LANES)
    if size < BLOCK:
        out[:] = padded[:, :size, :size]


@compiled
def weigh_values(out: np.ndarray, at: int, source: np.ndarray, first: int, step: int, length: int, weights: np.ndarray) -> None:
    """Apply `weigh` to `length` values, at least LANES. The last vector can overlap the one before it."""
    taps = len(weights)
    for block in range(0, length, LANES):
        x = min(block, length - LANES)
        if taps <= SMALL_KERNEL_TAPS:
            weigh_fast(out, at + x, source, first + x, step, weights, 0, taps)
        else:
            weigh(out, at + x, source, first + x, step, weights, 0, taps)


@compiled
def blur_weights(sigma: float, size: int) -> np.ndarray:
    """Return `[2 * reach + 1] int16`, a Gaussian for crops of `size`, cut off at three sigma and where rounding makes it zero."""
    reach = min(math.ceil(3 * sigma), size - 1)
    exact, weights = np.empty(2 * reach + 1), np.empty(2 * reach + 1, np.int16)
    for k in range(len(exact)):
        exact[k] = math.exp(-((k - reach) ** 2) / (2 * sigma * sigma))
    round_weights(weights, exact)
    while len(weights) > 1 and weights[0] == 0:
        weights = weights[1:-1].copy()
    return weights


@compiled
def blur(crop: np.ndarray, sigma: float) -> None:
    """Blur `crop` `[3, S, S] uint8` in place by `blur_weights`, borders mirrored at the edge pixel."""
    size = crop.shape[1]
    weights, width = blur_weights(sigma, size), max(size, LANES)
    reach = len(weights) // 2
    if reach == 0:
        return
    # Buffers: a channel with mirrored rows above and below; its vertically blurred rows, with mirrored columns; one result.
    padded, step = np.zeros((size + 2 * reach) * width, np.uint8), width + 2 * reach
    rows, result = np.zeros(size * step, np.int16), np.empty(width, np.uint8)
    flat = crop.reshape(crop.size)
    for c in range(3):
        for y in range(size + 2 * reach):
            mirrored = size - 1 - abs(size - 1 - abs(y - reach))
            start = (c * size + mirrored) * size
            copy(padded[y * width : y * width + size], flat[start : start + size])
        for y in range(size):  # vertically, then mirror the columns
            row = rows[y * step : (y + 1) * step]
            weigh_values(row, reach, padded, y * width, width, width, weights)
            for k in range(1, reach + 1):
                row[reach - k] = row[reach + k]
                row[reach + size - 1 + k] = row[reach + size - 1 - k]
        for y in range(size):  # horizontally
            weigh_values(result, 0, rows, y * step, 1, width, weights)
            start = (c * size + y) * size
            copy(flat[start : start + size], result)


@compiled
def copy(out: np.ndarray, source: np.ndarray) -> None:
    """Copy `len(out)` values. The compiler turns a loop over flat arrays into a copy of memory."""
    for i in range(len(out)):
        out[i] = source[i]


@compiled
def colour_numbers(
    brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[int, int, int, int, int, int, int, np.ndarray]:
    """Return the arguments of `brighten` and of `mix`, all but the shift: factor, bits; factor, up, top, rounding, down, matrix.

    They are as precise as int16 allows. The colours must be float32, and `hue` degrees, or they differ now and then.
    """
    bits = fraction_bits(brightness, 7, 8, 2 * MAX_INT16)
    bright = min(int(brightness * (1 << bits + 8) + 0.5), 2 * MAX_INT16 + 1)
    contrast_bits = fraction_bits(contrast, 5, 8, MAX_INT16)
    factor = min(int(contrast * (1 << contrast_bits + 8) + 0.5), MAX_INT16)
    matrix, down = round_matrix(colour_matrix(saturation, hue))
    rounding = (1 << down >> 1) + 1  # one half, plus 1 because three products were rounded down
    return bright, bits, factor, 7 - contrast_bits, 255 << contrast_bits, rounding, down, matrix


@compiled
def twist_colours(crop: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> None:
    """Change `crop` `[3, S, S] uint8` in place: brightness, contrast around the mean gray, saturation, hue (degrees)."""
    plane = crop.size // 3
    full = plane - plane % BLOCK
    bright, bits, factor, up, top, rounding, down, matrix = colour_numbers(brightness, contrast, saturation, hue)
    # The pixels after the last full vector are padded to one vector of their own.
    flat, rest = crop.reshape(3, plane), np.zeros((3, BLOCK), np.uint8)
    rest[:, : plane - full] = flat[:, full:]
    # Brightness first: contrast pivots on the mean gray of the result.
    mean = 0.0
    for c in range(3):
        total = brighten(rest[c], 0, 1, bright, bits)
        for first in range(0, full, MAX_PIXELS):
            total += brighten(flat[c], first, min(MAX_PIXELS, full - first) // BLOCK, bright, bits)
        mean += GRAY_WEIGHTS[c] * total / plane
    # Contrast, saturation and hue in one pass.
    shift = min(max(math.floor(mean * (1 - contrast) * (128 >> up) + 0.5), -MAX_INT16), MAX_INT16)
    mix(crop.reshape(crop.size), 0, plane, full // BLOCK, factor, shift, top, up, matrix, rounding, down)
    mix(rest.reshape(rest.size), 0, BLOCK, 1, factor, shift, top, up, matrix, rounding, down)
    flat[:, full:] = rest[:, : plane - full]


@compiled
def round_matrix(exact: np.ndarray) -> tuple[np.ndarray, int]:
    """Return `exact` `[3, 3] float64` as `[9] int16`, and how many of the fraction bits a sum of products keeps."""
    max_sum = 0.0  # of a row, which bounds its sum of products
    for i in range(3):
        max_sum = max(max_sum, abs(exact[i, 0]) + abs(exact[i, 1]) + abs(exact[i, 2]))
    bits = fraction_bits(max_sum, 4, 9, MAX_INT16 - 64)
    weights = np.empty(9, np.int16)
    for i in range(9):
        weight = math.floor(exact[i // 3, i % 3] * (1 << bits + 9) + 0.5)
        weights[i] = min(max(weight, -MAX_INT16), MAX_INT16)
    return weights, bits


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
