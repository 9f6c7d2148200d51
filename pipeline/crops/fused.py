"""All crops of a batch on a GPU by one kernel (`kernel.cu`), with the bytes of the compiled CPU operator."""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit

from pipeline.crops.augment import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    HUE,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TWIST,
    ViewRecipe,
    draw_parameters,
)
from pipeline.crops.cpu_operator import SOURCES_DIGEST, cached, crop_once
from pipeline.crops.cubin import STRIP, CropKernel
from pipeline.crops.device import DeviceError
from pipeline.crops.kernels import blur_weights, colour_numbers, cut_box, num_taps

REACH, WEIGHTS = 30, 31  # places in a `Crop` of the kernel, in int32
SCRATCH_BYTES = 256 << 20  # at most, where crops do not fit in shared memory
MAX_HELD = 4  # batches of decoded images that the kernel may still read
CHECKED_CROPS = 8  # of each size, by `self_check`
CHECKED = ViewRecipe(
    1, (0.05, 1.0), flip_prob=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray_prob=0.2,
    blur_prob=0.5, solarize_prob=0.3,
)  # fmt: skip


@dataclass(frozen=True)
class PreparedBatch:
    """What the kernel needs for `size` images: `rows` `[B * V, columns] int32`, and for each crop size the views that have it,
    the first of their rows, and the bytes of memory for each crop."""

    size: int
    rows: np.ndarray
    groups: list[tuple[int, list[int], int, int]]


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


class FusedCrops:
    """Makes the crops of batch after batch with `kernel`. `recipes`: those of the V crops of an image.

    Crops of one size lie together in torch's memory, `[B, views, S, S, 3] uint8`, and are returned as views of it.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], kernel: CropKernel) -> None:
        self.kernel, self.sizes = kernel, np.array([recipe.size for recipe in recipes])
        # The images of the batches that the kernel may still read: DALI reuses their memory as soon as they are dropped.
        self._held: deque[tuple[Any, torch.cuda.Event]] = deque()
        weakref.finalize(self, drop_read, self._held, 0)

    def prepare(self, addresses: Sequence[int], sides: np.ndarray, values: np.ndarray) -> PreparedBatch:
        """Describe the crops of a batch, by its images' addresses on the device, `sides` `[B, 2] int64`, their heights and
        widths, and `values` `[B, V, P] float32`, as drawn.
        """
        batch, groups = len(addresses), list[tuple[int, list[int], int]]()
        places = np.empty((len(self.sizes), 2), np.int64)
        for size in dict.fromkeys(self.sizes.tolist()):
            views = np.flatnonzero(self.sizes == size)
            first = batch * sum(len(others) for _, others, _ in groups)
            places[views, 0], places[views, 1] = first + np.arange(len(views)), len(views)
            groups.append((size, views.tolist(), first))
        rows = np.empty((batch * len(self.sizes), num_columns(values)), np.int32)
        taps = fill_rows(rows, places, np.array(addresses, np.int64), sides, np.ascontiguousarray(values), self.sizes)
        rooms = [(size, views, first, room_bytes(size, int(taps[views].max()))) for size, views, first in groups]
        return PreparedBatch(batch, rows, rooms)

    def make(self, batch: PreparedBatch, rows: torch.Tensor, images: Any) -> list[torch.Tensor]:
        """Return V crops `[B, 3, S, S] uint8`, ready for torch's current stream. `rows`: those of `batch` on the device.

        `images`, which own the memory of the decoded images, are kept until the kernel has read them.
        """
        crops: dict[int, torch.Tensor] = {}
        for size, views, first, room in batch.groups:
            out = torch.empty(batch.size, len(views), size, size, 3, dtype=torch.uint8, device=self.kernel.device)
            blocks = batch.size * len(views)
            in_scratch = room > self.kernel.shared_limit
            at_once = max(1, min(blocks, SCRATCH_BYTES // room)) if in_scratch else blocks
            scratch = torch.empty(at_once * room if in_scratch else 0, dtype=torch.uint8, device=self.kernel.device)
            for block in range(0, blocks, at_once):
                self.kernel.launch(
                    min(at_once, blocks - block), rows[first + block].data_ptr(), rows.shape[1],
                    out.data_ptr() + block * 3 * size * size, size, scratch.data_ptr() if in_scratch else 0, room,
                )  # fmt: skip
            crops |= {view: crop.permute(0, 3, 1, 2) for view, crop in zip(views, out.unbind(1), strict=True)}
        self._held.append((images, self.kernel.mark()))
        drop_read(self._held, MAX_HELD)
        return [crops[view] for view in range(len(self.sizes))]


def drop_read(held: deque[tuple[Any, torch.cuda.Event]], most: int) -> None:
    """Drop the images that the kernel has read; if more than `most` batches are left, wait for the oldest."""
    while held and (held[0][1].query() or len(held) > most):
        held[0][1].synchronize()
        held.popleft()


def num_columns(values: np.ndarray) -> int:
    """Return the length of a row, an even number, that holds the widest blur of `values` `[..., P]`."""
    return WEIGHTS + 1 + math.ceil(3 * float(values[..., SIGMA].max())) + 1 & ~1


def room_bytes(size: int, taps: int) -> int:
    """Return the bytes of memory in which a block of the kernel makes a crop, with at most `taps` weights of a resize in sum."""
    return (3 * size * size + 15 & ~15) + 16 + max(6 * STRIP * size, 8 * size + 2 * size * taps)


def self_check(sizes: Iterable[int], kernel: CropKernel) -> None:
    """Make crops of one image with all operations. Raises DeviceError unless they have the bytes of the CPU operator."""
    recipes = tuple(replace(CHECKED, size=size) for size in dict.fromkeys(sizes))
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    image[:150] //= 3  # so that boxes differ in brightness
    sides = np.array([image.shape[:2]] * CHECKED_CROPS)
    values = np.ascontiguousarray(draw_parameters(recipes, 0, 0, 0, *sides.T).swapaxes(0, 1))
    on_device, fused = torch.from_numpy(image).to(kernel.device), FusedCrops(recipes, kernel)
    batch = fused.prepare([on_device.data_ptr()] * CHECKED_CROPS, sides, values)
    crops = [crop.cpu().numpy() for crop in fused.make(batch, torch.from_numpy(batch.rows).to(kernel.device), on_device)]
    for number, drawn in enumerate(values):
        for crop, expected in zip(crops, crop_once(image, drawn, fused.sizes.tolist()), strict=True):
            if not np.array_equal(crop[number], expected):
                size = expected.shape[-1]
                raise DeviceError(f"the kernel's crops of {size} pixels differ from those of the CPU operator")
