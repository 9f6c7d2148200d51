"""The crops of one image as a DALI operator: DALI's threads call the compiled code, without the interpreter.

All crops of an image are made one after the other, while the processor still has it in its cache.

DALI's own Numba plugin compiles its generic glue again in every process, for five seconds and more. Here the two entry points
that it hands to DALI are written out, so that their machine code is kept on disk, and only its operator class is used.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc
from numba.core.types import int32, uint64, void
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction
from nvidia.dali.plugin.numba import address_as_void_pointer as pointer  # type: ignore[attr-defined]

from pipeline.crops import augment, colours, draws, kernels, vectors
from pipeline.crops.draws import FLIP, PARAMETERS, PIXEL_PARAMETERS
from pipeline.crops.kernels import resize
from pipeline.crops.vectors import compiled

NUM_INPUTS, NUM_PARAMETERS = 4, len(PARAMETERS)
MOST_OUTPUTS = 6  # of an operator of this kind
# All that the entry points are compiled from: code, and the constants that become a part of it.
SOURCES = (augment.__file__, colours.__file__, draws.__file__, kernels.__file__, vectors.__file__, __file__)


@compiled
def make_crop(out: np.ndarray, image: np.ndarray, values: np.ndarray) -> None:
    """Fill `out` `[3, S, S] uint8` from `image` `[H, W, 3] uint8` by `values` `[12] float32` in the order of PARAMETERS."""
    # Never outside the image, whatever the index says of its size.
    y1, x1 = min(int(values[2]), image.shape[0]), min(int(values[3]), image.shape[1])
    y0, x0 = min(int(values[0]), y1 - 1), min(int(values[1]), x1 - 1)
    resize(out, image, y0, x0, y1, x1, values[FLIP] != 0)
    augment.apply(out, values[PIXEL_PARAMETERS:])


def digest(paths: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def cached_cfunc(function: Callable, *arguments: Any) -> Any:
    """Compile a function that C calls; its machine code is kept beside this file, in the user's cache or in NUMBA_CACHE_DIR.

    Numba looks at the function's own file and at the values that it encloses, not at what it calls: so it must enclose the
    digest of its sources, or a change of the kernels would go unnoticed. Where no folder can be written, as in a read-only
    installation, each process compiles again.
    """
    try:
        return cfunc(void(*arguments), cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return cfunc(void(*arguments))(function)


@compiled
def scale_crop(out: np.ndarray, crop: np.ndarray, scaling: np.ndarray) -> None:
    """`out` `float32` = (`crop` `uint8` - offset) / spread of each channel, both `[3, S, S]`; `scaling` `[3, 2] float32`."""
    for c in range(3):
        result, values = out[c].reshape(out[c].size), crop[c].reshape(crop[c].size)
        offset, spread = scaling[c]
        for i in range(len(values)):
            result[i] = (np.float32(values[i]) - offset) / spread


# DALI passes addresses: of the data pointers, of the pointers to shapes, and of the numbers of dimensions.
def crop_entry(sources: str) -> Any:
    def run(
        outs: int, out_shapes: int, out_ndims: int, num_outs: int, ins: int, in_shapes: int, in_ndims: int, num_ins: int
    ) -> None:
        _ = sources
        data = carray(pointer(ins), NUM_INPUTS, np.int64)
        shapes = carray(pointer(in_shapes), NUM_INPUTS, np.int64)
        height, width = carray(pointer(shapes[0]), 2, np.int64)
        image = carray(pointer(data[0]), (height, width, 3), np.uint8)
        views = carray(pointer(shapes[1]), 1, np.int64)[0]
        values = carray(pointer(data[1]), (views, NUM_PARAMETERS), np.float32)
        ruler = carray(pointer(shapes[2]), 2 + num_outs, np.int64)
        scaled = carray(pointer(shapes[3]), 1, np.int64)[0] != 0
        crops = carray(pointer(outs), num_outs, np.int64)
        for v in range(num_outs):
            size, drawn = ruler[2 + v], values[ruler[1] + v]
            # Each function is called at one place: the compiler copies it to every one.
            crop = (
                np.empty((3, size, size), np.uint8) if scaled else carray(pointer(crops[v]), (3, size, size), np.uint8)
            )
            make_crop(crop, image, drawn)
            if scaled:
                out = carray(pointer(crops[v]), (3, size, size), np.float32)
                scale_crop(out, crop, carray(pointer(data[3]), (3, 2), np.float32))

    return cached_cfunc(run, uint64, uint64, uint64, int32, uint64, uint64, uint64, int32)


def shape_entry(sources: str) -> Any:
    def set_shapes(
        out_shapes: int, out_ndims: int, num_outs: int, in_shapes: int, in_ndims: int, num_ins: int, batch_size: int
    ) -> None:
        _ = sources
        out = carray(pointer(out_shapes), (num_outs, batch_size), np.int64)
        rulers = carray(pointer(in_shapes), (NUM_INPUTS, batch_size), np.int64)[2]
        for i in range(batch_size):
            ruler = carray(pointer(rulers[i]), 2 + num_outs, np.int64)
            for v in range(num_outs):
                shape = carray(pointer(out[v, i]), 3, np.int64)
                shape[0], shape[1], shape[2] = 3, ruler[2 + v], ruler[2 + v]

    return cached_cfunc(set_shapes, uint64, uint64, int32, uint64, uint64, int32, int32)


MADE_FROM = digest(SOURCES)
RUN, SET_SHAPES = crop_entry(MADE_FROM), shape_entry(MADE_FROM)


def make_crops(
    image: "types.DataNode", values: "types.DataNode", sizes: Sequence[int], scaling: np.ndarray | None = None
) -> list["types.DataNode"]:
    """The V crops of `image` `[H, W, 3] uint8`, `[3, S, S]` each, by `values` `[V, 12] float32` in the order of PARAMETERS.

    They are uint8, or float32 with `scaling` `[3, 2] float32`, the offset and spread of each channel.
    """
    crops: list[types.DataNode] = []
    for first in range(0, len(sizes), MOST_OUTPUTS):
        part = sizes[first : first + MOST_OUTPUTS]
        # Only the shapes of the inputs are known when the outputs are allocated, so that of an empty one carries numbers.
        ruler = types.Constant(np.zeros((0, first, *part), np.uint8))
        made = MakeCrops(len(part), scaling is not None)(
            image, values, ruler, types.Constant(np.zeros((0, 2), np.float32) if scaling is None else scaling)
        )
        crops += made if isinstance(made, list | tuple) else [made]
    return crops


class MakeCrops(NumbaFunction):
    """`op(image, values, ruler, scaling)`: the inputs of `make_crops`, and as `ruler` an array of shape `[0, first, S...]`.

    `first` is the row of `values` that belongs to the first of the outputs. `scaling` has no rows for crops of uint8.
    """

    def __init__(self, num_crops: int, scaled: bool) -> None:
        super().__init__(
            run_fn=None,
            out_types=[types.FLOAT if scaled else types.UINT8] * num_crops,
            in_types=[types.UINT8, types.FLOAT, types.UINT8, types.FLOAT],
            outs_ndim=[3] * num_crops,
            ins_ndim=[3, 2, 2 + num_crops, 2],
        )

    def _get_run_fn_cpu(self, *_: Any) -> int:
        return RUN.address

    def _get_setup_fn_cpu(self, *_: Any) -> int:
        return SET_SHAPES.address
