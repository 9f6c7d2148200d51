"""All crops of a batch on a GPU by one kernel (`kernel.cu`), with the bytes of the compiled CPU operator."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from pipeline.crops.augment import BRIGHTNESS, CONTRAST, FLIP, HUE, SATURATION, SIGMA, SOLARIZE, TWIST
from pipeline.crops.cpu_operator import SOURCES_DIGEST, cached
from pipeline.crops.kernels import blur_weights, colour_numbers, cut_box, num_taps

KERNEL = Path(__file__).with_name("kernel.cu")
STRIP = 8  # of the kernel
REACH, WEIGHTS = 30, 31  # places in a `Crop` of the kernel, in int32


def rows_entry(sources: str) -> Any:
    """Compile the function that writes the kernel's rows. `sources`: the digest of the CPU operator's SOURCES."""

    def fill_rows(
        rows: np.ndarray, places: np.ndarray, images: np.ndarray, sides: np.ndarray, values: np.ndarray, sizes: np.ndarray
    ) -> np.ndarray:
        """Write a `Crop` of `kernel.cu` for each crop into `rows` `[B * V, columns] int32`: that of view v of image b at
        `places[v, 0] + b * places[v, 1]`. Return `[V]`, the most weights of a resize, vertical and horizontal ones together.

        `images`: `[B] int64`, addresses on the device. `sides`: `[B, 2] int64`, their height and width. `values`: `[B, V, P]
        float32`, as drawn. `sizes`: `[V] int64`, of the crops in pixels.
        """
        _ = sources
        most = np.zeros(len(sizes), np.int64)
        for b in range(len(images)):
            for v in range(len(sizes)):
                row, drawn, size = rows[places[v, 0] + b * places[v, 1]], values[b, v], sizes[v]
                y0, x0, y1, x1 = cut_box(drawn, sides[b, 0], sides[b, 1])
                y_taps, x_taps = num_taps(y1 - y0, size), num_taps(x1 - x0, size)
                most[v] = max(most[v], y_taps + x_taps)
                row[:] = 0
                row[:2].view(np.int64)[0] = images[b]
                row[2], row[3], row[4], row[5], row[6], row[7] = sides[b, 0], sides[b, 1], y0, x0, y1, x1
                row[8], row[9], row[10], row[11] = y_taps, x_taps, drawn[FLIP] != 0, drawn[SOLARIZE] != 0
                if drawn[TWIST] != 0:
                    colours = colour_numbers(drawn[BRIGHTNESS], drawn[CONTRAST], drawn[SATURATION], drawn[HUE])
                    row[12], row[13:14].view(np.float32)[0] = 1, drawn[CONTRAST]
                    row[14], row[15], row[16], row[17], row[18], row[19], row[20] = colours[:7]
                    row[21:30] = colours[7]
                if drawn[SIGMA] > 0:
                    weights = blur_weights(drawn[SIGMA], size)
                    reach = row[REACH] = len(weights) // 2
                    row[WEIGHTS : WEIGHTS + reach + 1] = weights[reach:]
        return most

    return cached(partial(njit, nogil=True, error_model="numpy"), fill_rows)


fill_rows = rows_entry(SOURCES_DIGEST)


def num_columns(values: np.ndarray) -> int:
    """Return the length of a row, an even number, that holds the widest blur of `values` `[..., P]`."""
    return WEIGHTS + 1 + math.ceil(3 * float(values[..., SIGMA].max())) + 1 & ~1


def room_bytes(size: int, taps: int) -> int:
    """Return the bytes of memory in which a block of the kernel makes a crop, with at most `taps` weights of a resize in sum."""
    return (3 * size * size + 15 & ~15) + 16 + max(6 * STRIP * size, 8 * size + 2 * size * taps)
