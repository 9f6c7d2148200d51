"""All crops of one image as a DALI operator: DALI's threads call compiled code, without the interpreter.

The crops of an image are made one after another, while the image is still in the processor's cache.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc
from numba.core.types import int32, uint64, void
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction
from nvidia.dali.plugin.numba import address_as_void_pointer as pointer  # type: ignore[attr-defined]

from pipeline.crops import augment, kernels, vectors
from pipeline.crops.augment import PARAMETERS
from pipeline.crops.kernels import blur, cut_box, invert_above, resize, twist_colours
from pipeline.crops.vectors import compiled

NUM_INPUTS, NUM_PARAMETERS = 4, len(PARAMETERS)
MAX_OUTPUTS = 6  # DALI's limit for an operator of this kind
# Every file whose code or constants are compiled into the entry points.
SOURCES = (augment.__file__, kernels.__file__, vectors.__file__, __file__)


@compiled
def make_crop(out: np.ndarray, image: np.ndarray, values: np.ndarray) -> None:
    """Fill `out` `[3, S, S] uint8` from `image` `[H, W, 3] uint8`, by `values` `[P] float32` in the order of PARAMETERS."""
    y0, x0, y1, x1 = cut_box(values, image.shape[0], image.shape[1])
    resize(out, image, y0, x0, y1, x1, values[augment.FLIP] != 0)
    if values[augment.TWIST] != 0:
        twist_colours(out, values[augment.BRIGHTNESS], values[augment.CONTRAST], values[augment.SATURATION], values[augment.HUE])
    if values[augment.SIGMA] > 0:
        blur(out, values[augment.SIGMA])
    if values[augment.SOLARIZE] != 0:
        invert_above(out, augment.SOLARIZE_THRESHOLD)


@compiled
def scale_crop(out: np.ndarray, crop: np.ndarray, scaling: np.ndarray) -> None:
    """Set `out` `float32` to (`crop` `uint8` - offset) / spread, both `[3, S, S]`; `scaling` `[3, 2]`: offset, spread."""
    for c in range(3):
        result, values = out[c].reshape(out[c].size), crop[c].reshape(crop[c].size)
        offset, spread = scaling[c]
        for i in range(len(values)):
            result[i] = (np.float32(values[i]) - offset) / spread


def digest(paths: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def cached(decorator: Callable, function: Callable) -> Any:
    """Compile a function and cache its machine code on disk (next to its file, or in NUMBA_CACHE_DIR). `decorator`: numba's.

    Numba's cache checks the function's own file and the values that it encloses, but not the functions that it calls: it must
    enclose the digest of SOURCES, or a change of the kernels would go unnoticed. Without a writable folder, as in a read-only
    installation, each process compiles again.
    """
    try:
        return decorator(cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return decorator()(function)


# DALI passes addresses: of the arrays of data pointers, of pointers to shapes, and of numbers of dimensions.
def crop_entry(sources: str) -> Any:
    """Compile the function that DALI calls for each image. `sources`: the digest of SOURCES."""

    def crop_image(
        outs: int, out_shapes: int, out_ndims: int, num_outs: int, ins: int, in_shapes: int, in_ndims: int, num_ins: int
    ) -> None:
        _ = sources
        data = carray(pointer(ins), NUM_INPUTS, np.int64)
        shapes = carray(pointer(in_shapes), NUM_INPUTS, np.int64)
        height, width = carray(pointer(shapes[0]), 2, np.int64)
        image = carray(pointer(data[0]), (height, width, 3), np.uint8)
        views = carray(pointer(shapes[1]), 1, np.int64)[0]
        values = carray(pointer(data[1]), (views, NUM_PARAMETERS), np.float32)
        layout = carray(pointer(shapes[2]), 2 + num_outs, np.int64)
        scaled = carray(pointer(shapes[3]), 1, np.int64)[0] != 0
        crops = carray(pointer(outs), num_outs, np.int64)
        for v in range(num_outs):
            size, drawn = layout[2 + v], values[layout[1] + v]
            # One call of each function, because the compiler inlines every call.
            crop = np.empty((3, size, size), np.uint8) if scaled else carray(pointer(crops[v]), (3, size, size), np.uint8)
            make_crop(crop, image, drawn)
            if scaled:
                out = carray(pointer(crops[v]), (3, size, size), np.float32)
                scale_crop(out, crop, carray(pointer(data[3]), (3, 2), np.float32))

    return cached(partial(cfunc, void(uint64, uint64, uint64, int32, uint64, uint64, uint64, int32)), crop_image)


def shape_entry(sources: str) -> Any:
    """Compile the function that tells DALI the shapes of all outputs. `sources`: the digest of SOURCES."""

    def set_shapes(
        out_shapes: int, out_ndims: int, num_outs: int, in_shapes: int, in_ndims: int, num_ins: int, batch_size: int
    ) -> None:
        _ = sources
        out = carray(pointer(out_shapes), (num_outs, batch_size), np.int64)
        layouts = carray(pointer(in_shapes), (NUM_INPUTS, batch_size), np.int64)[2]
        for i in range(batch_size):
            layout = carray(pointer(layouts[i]), 2 + num_outs, np.int64)
            for v in range(num_outs):
                shape = carray(pointer(out[v, i]), 3, np.int64)
                shape[0], shape[1], shape[2] = 3, layout[2 + v], layout[2 + v]

    return cached(partial(cfunc, void(uint64, uint64, int32, uint64, uint64, int32, int32)), set_shapes)


SOURCES_DIGEST = digest(SOURCES)
CROP_IMAGE, SET_SHAPES = crop_entry(SOURCES_DIGEST), shape_entry(SOURCES_DIGEST)
CACHE_FOLDER = CROP_IMAGE._cache.cache_path  # where numba keeps machine code; None: nowhere


def crop_once(image: np.ndarray, values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the V crops, `[3, S, S] uint8`, of one image `[H, W, 3] uint8`, without DALI. `values`: `[V, P] float32`."""
    crops = [np.empty((3, size, size), np.uint8) for size in sizes]
    shapes = [np.array(shape) for shape in (image.shape, values.shape, (0, 0, *sizes), (0, 2))]
    outs, shaped = (np.array([array.ctypes.data for array in arrays]) for arrays in (crops, shapes))
    ins = np.array([image.ctypes.data, values.ctypes.data, 0, 0])
    CROP_IMAGE.ctypes(outs.ctypes.data, 0, 0, len(crops), ins.ctypes.data, shaped.ctypes.data, 0, NUM_INPUTS)
    return crops


class MakeCrops(NumbaFunction):
    """DALI's Numba operator with our own entry points: `op(image, values, layout, scaling)` makes up to six crops.

        image   [H, W, 3] uint8 ────┐
        values  [V, P] float32 ─────┼──> make_crop(crop, image, values[first + v]) ──> crop v [3, S, S] uint8, or, if scaled,
        layout  [0, first, S, ...] ─┘                                                    │
        scaling [3, 2] float32 ────────────> (crop - offset) / spread <──────────────────┘ ──> crop v [3, S, S] float32

        values[v] = y0 x0 y1 x1 flip | twist brightness contrast saturation hue | sigma | solarize
                    resize             twist_colours, if twist                    blur    invert_above

    DALI's plugin compiles its generic glue again in every process, for five seconds and more. Here its two entry points are
    written out, so that their machine code is cached on disk, and only the operator class is used. DALI tells `set_shapes` just
    the shapes of the inputs, so `layout` is a dummy input: an empty array whose shape carries the numbers, the row of `values` of
    the first output and then the size of each output. `scaling` has no rows for crops of uint8.
    """

    def __init__(self, num_crops: int, scaled: bool) -> None:
        outs, ins = [types.FLOAT if scaled else types.UINT8] * num_crops, [types.UINT8, types.FLOAT, types.UINT8, types.FLOAT]
        dimensions: dict[str, Any] = {"outs_ndim": [3] * num_crops, "ins_ndim": [3, 2, 2 + num_crops, 2]}
        super().__init__(run_fn=None, out_types=outs, in_types=ins, **dimensions)

    def _get_run_fn_cpu(self, *_: Any) -> int:
        return CROP_IMAGE.address

    def _get_setup_fn_cpu(self, *_: Any) -> int:
        return SET_SHAPES.address


def make_crops(
    image: "types.DataNode", values: "types.DataNode", sizes: Sequence[int], scaling: np.ndarray | None = None
) -> list["types.DataNode"]:
    """Return the V crops of `image`, `[3, S, S]` each: uint8, or float32 with `scaling`, each channel's offset and spread."""
    scaling_input = types.Constant(np.zeros((0, 2), np.float32) if scaling is None else scaling)
    crops: list[types.DataNode] = []
    for first in range(0, len(sizes), MAX_OUTPUTS):
        part = sizes[first : first + MAX_OUTPUTS]
        layout = types.Constant(np.zeros((0, first, *part), np.uint8))
        made = MakeCrops(len(part), scaling is not None)(image, values, layout, scaling_input)
        crops += made if isinstance(made, list | tuple) else [made]  # DALI returns a single output bare
    return crops
