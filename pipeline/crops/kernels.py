"""Resize and blur of one crop on the CPU, compiled. Colours are in `pipeline/crops/colours.py`.

Crops are planar, in 8 bits. A pass is a weighted sum of vectors in fixed point (`pipeline/crops/vectors.py`): the same input
gives the same bytes on every machine.
"""

import math

import numpy as np

from pipeline.crops.vectors import BLOCK, LANES, WEIGHT_BITS, compiled, transpose, weigh, weigh_fast

ONE = 1 << WEIGHT_BITS
SMALL_KERNEL_TAPS = 13  # of a blur; up to here sums in 16 bits are within 0.02 grey levels of exact ones


@compiled
def filter_table(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangle filter of a resize from `length` to `size`, antialiased as in Pillow and torchvision.

    `starts` `[size] int64` and `weights` `[size, taps] int16`, with rows padded with zeros: a fixed number of taps makes the loop
    predictable.
    """
    scale = length / size
    support = max(scale, 1.0)
    taps = min(math.ceil(2 * support), length)
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
    if width < BLOCK:  # pad a box that is narrower than a vector
        box = np.zeros((height, BLOCK, 3), np.uint8)
        box[:, :width] = image[y0:y1, x0:x1]
        image, y0, x0 = box, 0, 0
    step = 3 * image.shape[1]
    source = image.reshape(image.size)[y0 * step + 3 * x0 :]
    y_table, x_table = filter_table(height, size), filter_table(width, size)
    result = np.empty((3, BLOCK, BLOCK), np.uint8) if size < BLOCK else out
    resize_vectors(result, size, source, step, 3 * max(width, BLOCK), y_table, x_table, flip)
    if size < BLOCK:
        out[:] = result[:, :size, :size]


@compiled
def resize_vectors(
    out: np.ndarray,
    size: int,
    source: np.ndarray,
    step: int,
    length: int,
    y_table: tuple[np.ndarray, np.ndarray],
    x_table: tuple[np.ndarray, np.ndarray],
    flip: bool,
) -> None:
    """Resize rows of `length` bytes, `step` apart in `source`, to the first `size` rows and columns of `out`.

    It makes BLOCK rows at a time. Each is a weighted sum of source rows; then they are transposed, so that one vector holds one
    column of them all, and a column of the result is a weighted sum of vectors again.
    """
    (y_starts, y_weights), (x_starts, x_weights) = y_table, x_table
    y_taps, x_taps = y_weights.shape[1], x_weights.shape[1]
    y_flat, x_flat = y_weights.reshape(y_weights.size), x_weights.reshape(x_weights.size)
    rows, columns = np.empty(BLOCK * length, np.int16), np.empty(BLOCK * length, np.int16)
    made, stride, result = np.empty(out.shape[1] * LANES, np.uint8), out.shape[1], out.reshape(out.size)
    for block in range(0, size, BLOCK):
        top = max(min(block, size - BLOCK), 0)  # the last block can overlap the one before it
        for r in range(BLOCK):
            y = min(top + r, size - 1)
            for x in range(0, length, LANES):
                x = min(x, length - LANES)
                weigh(rows, r * length + x, source, y_starts[y] * step + x, step, y_flat, y * y_taps, y_taps)
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


@compiled
def weigh_values(
    out: np.ndarray, at: int, source: np.ndarray, first: int, step: int, length: int, weights: np.ndarray
) -> None:
    """Apply `weigh` to `length` values, at least LANES. The last vector can overlap the one before it."""
    taps = len(weights)
    for block in range(0, length, LANES):
        x = min(block, length - LANES)
        if taps <= SMALL_KERNEL_TAPS:
            weigh_fast(out, at + x, source, first + x, step, weights, 0, taps)
        else:
            weigh(out, at + x, source, first + x, step, weights, 0, taps)


@compiled
def blur(crop: np.ndarray, sigma: float) -> None:
    """Blur `crop` `[3, S, S] uint8` in place by a Gaussian cut off at three sigma, borders mirrored at the edge pixel."""
    size = crop.shape[1]
    reach = min(math.ceil(3 * sigma), size - 1)
    taps, width = 2 * reach + 1, max(size, LANES)
    exact, weights = np.empty(taps), np.empty(taps, np.int16)
    for k in range(taps):
        exact[k] = math.exp(-((k - reach) ** 2) / (2 * sigma * sigma))
    round_weights(weights, exact)
    while reach > 0 and weights[0] == 0:  # drop taps that rounding has made zero
        reach, weights = reach - 1, weights[1:-1].copy()
    if reach == 0:
        return
    # Buffers: a channel with mirrored rows above and below; its vertically blurred rows, with mirrored columns; one result.
    padded, step = np.zeros((size + 2 * reach) * width, np.uint8), width + 2 * reach
    rows, result = np.zeros(size * step, np.int16), np.empty(width, np.uint8)
    flat = crop.reshape(crop.size)
    for c in range(3):
        for y in range(size + 2 * reach):
            start = (c * size + mirrored(y - reach, size)) * size
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
def mirrored(i: int, size: int) -> int:
    """Return the index inside `0..size` that mirrors `i`, which is at most `size - 1` outside."""
    return -i if i < 0 else i if i < size else 2 * size - 2 - i
