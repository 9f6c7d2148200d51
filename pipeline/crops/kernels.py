"""Loops over the pixels of one crop on the CPU, compiled: cut, resize and flip, colours, blur, solarisation.

The result is kept in 8 bits and planar, and every step works on one row at a time, so that a crop is read and written as
seldom as possible. No step depends on the order of a sum or on fused multiplies: the same input gives the same bytes on
every machine.
"""

import math

import numpy as np
from numba import njit

ZERO, HALF, WHITE = np.float32(0), np.float32(0.5), np.float32(255)
PIECE = 1024
GRAY = (0.299, 0.587, 0.114)  # the luma of ITU-R BT.601, which torchvision, Pillow and DALI share
# RGB to YIQ and back as DALI rounds them, so that both backends turn hues alike.
TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311))
FROM_YIQ = ((1.0, 0.956, 0.621), (1.0, -0.272, -0.647), (1.0, -1.107, 1.705))


compiled = njit(nogil=True)  # what is kept on disk is `cpu_operator`, which all of this becomes a part of


@compiled
def filter_table(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The triangle filter of a resize from `length` to `size`, antialiased as in Pillow and torchvision.

    `starts` `[size] int64` and `weights` `[size, taps] float32`, rows padded with zeros: a fixed number of taps lets the
    processor foresee the loop.
    """
    scale = length / size
    support = max(scale, 1.0)
    taps = min(math.ceil(2 * support) + 1, length)
    starts, weights = np.empty(size, np.int64), np.zeros((size, taps), np.float32)
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        start = min(first, length - taps)
        total = 0.0
        for place in range(first, last):
            total += max(1 - abs(place + 0.5 - centre) / support, 0.0)
        for place in range(first, last):
            weights[i, place - start] = max(1 - abs(place + 0.5 - centre) / support, 0.0) / total
        starts[i] = start
    return starts, weights


@compiled
def resize(out: np.ndarray, image: np.ndarray, y0: int, x0: int, y1: int, x1: int, flip: bool) -> None:
    """Resize a box of `image` `[H, W, 3] uint8` to `out` `[3, S, S] uint8`, mirrored left to right with `flip`.

    Nothing outside the box is read. Two rows are made at a time: their sums do not wait for one another.
    """
    size = out.shape[1]
    y_starts, y_weights = filter_table(y1 - y0, size)
    x_starts, x_weights = filter_table(x1 - x0, size)
    lines = image.reshape(image.shape[0], image.shape[1] * 3)[y0:y1, 3 * x0 : 3 * x1]
    upper, lower = np.empty(lines.shape[1], np.float32), np.empty(lines.shape[1], np.float32)
    for y in range(0, size, 2):
        below = min(y + 1, size - 1)
        weigh_rows(upper, lines, y_starts[y], y_weights[y])
        weigh_rows(lower, lines, y_starts[below], y_weights[below])
        for x in range(size):
            r0, g0, b0, r1, g1, b1 = HALF, HALF, HALF, HALF, HALF, HALF
            place = 3 * x_starts[x]
            for k in range(x_weights.shape[1]):
                weight = x_weights[x, k]
                r0 += weight * upper[place]
                g0 += weight * upper[place + 1]
                b0 += weight * upper[place + 2]
                r1 += weight * lower[place]
                g1 += weight * lower[place + 1]
                b1 += weight * lower[place + 2]
                place += 3
            column = size - 1 - x if flip else x
            out[0, y, column], out[1, y, column], out[2, y, column] = np.uint8(r0), np.uint8(g0), np.uint8(b0)
            out[0, below, column], out[1, below, column], out[2, below, column] = (
                np.uint8(r1),
                np.uint8(g1),
                np.uint8(b1),
            )


@compiled
def weigh_rows(result: np.ndarray, lines: np.ndarray, start: int, weights: np.ndarray) -> None:
    """`result` = the sum of the lines from `start` on, each times its weight."""
    result[:] = ZERO
    for k in range(len(weights)):
        weight, line = weights[k], lines[start + k]
        for x in range(len(result)):
            result[x] += weight * np.float32(line[x])


@compiled
def twist_colours(crop: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> None:
    """Brightness, contrast around the mean gray, saturation and hue (degrees), in this order, in place."""
    flat = crop.reshape(3, crop.size // 3)
    mean = 0.0
    for c in range(3):
        line, total = flat[c], np.int64(0)
        for i in range(len(line)):
            value = np.int32(min(np.float32(line[i]) * brightness + HALF, WHITE))
            line[i] = np.uint8(value)
            total += value
        mean += GRAY[c] * total / len(line)
    scale, shift = np.float32(contrast), np.float32(mean - contrast * mean)
    matrix = colour_matrix(saturation, hue)
    # In pieces that stay in the cache, channel by channel, so that several pixels are computed at once.
    piece = np.empty((3, PIECE), np.float32)
    for start in range(0, flat.shape[1], PIECE):
        pixels = min(PIECE, flat.shape[1] - start)
        for c in range(3):
            line, values = flat[c, start : start + pixels], piece[c]
            for i in range(pixels):
                values[i] = min(max(np.float32(line[i]) * scale + shift, ZERO), WHITE)
        red, green, blue = piece[0], piece[1], piece[2]
        for c in range(3):
            r, g, b, line = matrix[c, 0], matrix[c, 1], matrix[c, 2], flat[c, start : start + pixels]
            for i in range(pixels):
                value = r * red[i] + g * green[i] + b * blue[i]
                line[i] = np.uint8(np.int32(min(max(value, ZERO), WHITE) + HALF))


@compiled
def colour_matrix(saturation: float, hue: float) -> np.ndarray:
    """`[3, 3] float32`: the chroma plane of YIQ turned by `hue` degrees and scaled by `saturation`, in RGB."""
    cosine, sine = saturation * math.cos(math.radians(hue)), saturation * math.sin(math.radians(hue))
    matrix = np.empty((3, 3), np.float32)
    for i in range(3):
        for j in range(3):
            in_phase = cosine * TO_YIQ[1][j] + sine * TO_YIQ[2][j]
            quadrature = cosine * TO_YIQ[2][j] - sine * TO_YIQ[1][j]
            matrix[i, j] = TO_YIQ[0][j] + FROM_YIQ[i][1] * in_phase + FROM_YIQ[i][2] * quadrature
    return matrix


@compiled
def blur(crop: np.ndarray, sigma: float) -> None:
    """Gaussian blur of `crop` `[3, S, S] uint8` in place, cut off at three sigma, borders mirrored at the edge pixel."""
    size = crop.shape[1]
    reach = min(math.ceil(3 * sigma), size - 1)
    total = 0.0
    for k in range(-reach, reach + 1):
        total += math.exp(-k * k / (2 * sigma * sigma))
    taps = np.empty(2 * reach + 1, np.float32)
    for k in range(-reach, reach + 1):
        taps[k + reach] = math.exp(-k * k / (2 * sigma * sigma)) / total
    row, result = np.empty(size + 2 * reach, np.float32), np.empty(size, np.float32)
    for c in range(3):
        source = crop[c].copy()
        middle = row[reach : reach + size]
        for y in range(size):
            middle[:] = ZERO
            for k in range(-reach, reach + 1):
                tap, line = taps[k + reach], source[mirrored(y + k, size)]
                for x in range(size):
                    middle[x] += tap * np.float32(line[x])
            for k in range(1, reach + 1):
                row[reach - k] = middle[k]
                row[reach + size - 1 + k] = middle[size - 1 - k]
            result[:] = HALF
            for k in range(2 * reach + 1):
                tap, shifted = taps[k], row[k : k + size]
                for x in range(size):
                    result[x] += tap * shifted[x]
            for x in range(size):
                crop[c, y, x] = np.uint8(np.int32(result[x]))


@compiled
def mirrored(place: int, size: int) -> int:
    """The place inside `0..size` that a place at most `size - 1` outside stands for."""
    if place < 0:
        return -place
    return place if place < size else 2 * size - 2 - place


@compiled
def invert_above(crop: np.ndarray, threshold: int) -> None:
    """Solarisation of `crop` `[3, S, S] uint8` in place: values from `threshold` on are inverted."""
    flat = crop.reshape(crop.size)
    for i in range(flat.size):
        if flat[i] >= threshold:
            flat[i] = np.uint8(255) - flat[i]
