"""All crops of a batch on a GPU by one kernel (`kernel.cu`), with the bytes of the compiled CPU operator."""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import float32, int32, int64, njit

from pipeline.crops import augment
from pipeline.crops.cpu_operator import SOURCES_DIGEST, cached, crop_once
from pipeline.crops.cubin import STRIP, CropKernel
from pipeline.crops.device import DeviceError
from pipeline.crops.kernels import blur_weights, colour_numbers, cut_box, num_taps

REACH, WEIGHTS = 30, 31  # places in a `Crop` of the kernel, in int32
SCRATCH_BYTES = 256 << 20  # at most, where crops do not fit in shared memory
MAX_HELD = 4  # batches of decoded images that the kernel may still read
CHECKED_CROPS = 8  # of each size, by `self_check`
CHECKED = augment.ViewRecipe(
    1, (0.05, 1.0), flip_prob=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray_prob=0.2,
    blur_prob=0.5, solarize_prob=0.3,
)  # fmt: skip


def rows_entry(sources: str) -> Any:
    """Compile the function that writes the kernel's rows. `sources`: the digest of the CPU operator's SOURCES."""

    def fill_rows(rows: np.ndarray, images: np.ndarray, sides: np.ndarray, values: np.ndarray, size: int) -> int:
        """Fill `rows` `[B, V, columns] int32`, a `Crop` of kernel.cu each, for crops of one size. Return the most weights that a
        crop's resize has, vertical and horizontal ones together.

        `images`: `[B] int64`, addresses on the device. `sides`: `[B, 2] int64`, height and width. `values`: `[B, V, P] float32`.
        """
        _ = sources
        most = 0
        for b in range(rows.shape[0]):
            for v in range(rows.shape[1]):
                row, drawn = rows[b, v], values[b, v]
                y0, x0, y1, x1 = cut_box(drawn, sides[b, 0], sides[b, 1])
                y_taps, x_taps = num_taps(y1 - y0, size), num_taps(x1 - x0, size)
                most = max(most, y_taps + x_taps)
                row[:] = 0
                row[:2].view(np.int64)[0] = images[b]
                row[2], row[3], row[4], row[5], row[6], row[7] = sides[b, 0], sides[b, 1], y0, x0, y1, x1
                row[8], row[9], row[10], row[11] = y_taps, x_taps, drawn[augment.FLIP] != 0, drawn[augment.SOLARIZE] != 0
                if drawn[augment.TWIST] != 0:
                    contrast = drawn[augment.CONTRAST]
                    row[12], row[13:14].view(np.float32)[0] = 1, contrast
                    colours = colour_numbers(drawn[augment.BRIGHTNESS], contrast, drawn[augment.SATURATION], drawn[augment.HUE])
                    row[14], row[15], row[16], row[17], row[18], row[19], row[20] = colours[:7]
                    row[21:30] = colours[7]
                if drawn[augment.SIGMA] > 0:
                    weights = blur_weights(drawn[augment.SIGMA], size)
                    reach = row[REACH] = len(weights) // 2
                    row[WEIGHTS : WEIGHTS + reach + 1] = weights[reach:]
        return most

    signature = int64(int32[:, :, ::1], int64[::1], int64[:, ::1], float32[:, :, ::1], int64)
    return cached(partial(njit, signature, nogil=True, error_model="numpy"), fill_rows)


fill_rows = rows_entry(SOURCES_DIGEST)


@cache
def load_kernel(device_id: int) -> CropKernel:
    """Return the kernel on GPU `device_id`. Raises DeviceError."""
    return CropKernel(torch.device("cuda", device_id))


class FusedCrops:
    """Makes the crops of batch after batch with `kernel`; `sizes`: of the V crops of an image.

    Crops of one size lie together in torch's memory, `[B, views, S, S, 3] uint8`, and are returned as views of it.
    """

    def __init__(self, sizes: Sequence[int], kernel: CropKernel) -> None:
        self._kernel = kernel
        self._views = {size: [view for view, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
        # The images of the batches that the kernel may still read: DALI reuses their memory as soon as they are dropped.
        self._held: deque[tuple[Any, torch.cuda.Event]] = deque()
        weakref.finalize(self, drop_read, self._held, 0).atexit = False

    def prepare(self, addresses: Sequence[int], sides: np.ndarray, values: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
        """Return the kernel's rows for each crop size, and how many bytes of memory each of its blocks needs.

        `addresses`: of the B images on the device. `sides`: `[B, 2] int64`, height and width. `values`: `[B, V, P] float32`.
        """
        images, rows, rooms = np.array(addresses, np.int64), list[np.ndarray](), list[int]()
        columns = WEIGHTS + 1 + math.ceil(3 * float(values[..., augment.SIGMA].max())) + 1 & ~1  # even, for the widest blur
        for size, views in self._views.items():
            rows.append(np.empty((len(images), len(views), columns), np.int32))
            rooms.append(room_bytes(size, fill_rows(rows[-1], images, sides, np.ascontiguousarray(values[:, views]), size)))
        return rows, rooms

    def make(self, rows: Sequence[torch.Tensor], rooms: Sequence[int], images: Any) -> list[torch.Tensor]:
        """Return V crops `[B, 3, S, S] uint8`, ready for torch's current stream. `rows`: those of `prepare`, on the device.

        `images`, which own the memory of the decoded images, are kept until the kernel has read them.
        """
        crops: dict[int, torch.Tensor] = {}
        new = partial(torch.empty, dtype=torch.uint8, device=self._kernel.device)
        for (size, views), part, room in zip(self._views.items(), rows, rooms, strict=True):
            out, blocks = new(*part.shape[:2], size, size, 3), len(part) * len(views)
            at_once = blocks if room <= self._kernel.shared_limit else max(1, min(blocks, SCRATCH_BYTES // room))
            scratch = new(0 if room <= self._kernel.shared_limit else at_once * room)
            for block in range(0, blocks, at_once):
                row, place = part.data_ptr() + block * part.shape[2] * 4, out.data_ptr() + block * 3 * size * size
                self._kernel.launch(min(at_once, blocks - block), row, part.shape[2], place, size, scratch.data_ptr(), room)
            crops |= {view: crop.permute(0, 3, 1, 2) for view, crop in zip(views, out.unbind(1), strict=True)}
        self._held.append((images, self._kernel.mark()))
        drop_read(self._held, MAX_HELD)
        return [crops[view] for view in range(len(crops))]

    def wait(self) -> None:
        """Wait until the kernel has read all images, and drop them."""
        drop_read(self._held, 0)


def drop_read(held: deque[tuple[Any, torch.cuda.Event]], most: int) -> None:
    """Drop the images that the kernel has read; if more than `most` batches are left, wait for the oldest."""
    while held and (held[0][1].query() or len(held) > most):
        held[0][1].synchronize()
        held.popleft()


def room_bytes(size: int, taps: int) -> int:
    """Return the bytes of memory in which a block of the kernel makes a crop, with at most `taps` weights of a resize in sum."""
    return (3 * size * size + 15 & ~15) + 16 + max(6 * STRIP * size, 8 * size + 2 * size * taps)


def self_check(sizes: Iterable[int], kernel: CropKernel) -> None:
    """Make crops of one image with all operations. Raises DeviceError unless they have the bytes of the CPU operator."""
    sizes = list(dict.fromkeys(sizes))
    recipes = tuple(replace(CHECKED, size=size) for size in sizes)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    image[:150] //= 3  # so that boxes differ in brightness
    sides = np.array([image.shape[:2]] * CHECKED_CROPS)
    values = np.ascontiguousarray(augment.draw_parameters(recipes, 0, 0, 0, *sides.T).swapaxes(0, 1))
    there, fused = torch.from_numpy(image).to(kernel.device), FusedCrops(sizes, kernel)
    rows, rooms = fused.prepare([there.data_ptr()] * CHECKED_CROPS, sides, values)
    made = fused.make([torch.from_numpy(part).to(kernel.device) for part in rows], rooms, there)
    for size, crops, views in zip(sizes, made, values.swapaxes(0, 1), strict=True):
        for crop, drawn in zip(crops.cpu().numpy(), views, strict=True):
            if not np.array_equal(crop, crop_once(image, drawn[None], [size])[0]):
                raise DeviceError(f"the kernel's crops of {size} pixels differ from those of the CPU operator")
