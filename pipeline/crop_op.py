"""One crop of one image as a DALI operator: DALI's threads call the compiled code, without the interpreter.

DALI's own Numba plugin compiles its generic glue again in every process, for five seconds and more. Here the two entry points
that it hands to DALI are written out, so that their machine code is kept on disk, and only its operator class is used.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc
from numba.core.types import int32, uint64, void
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction
from nvidia.dali.plugin.numba import address_as_void_pointer as pointer  # type: ignore[attr-defined]

from pipeline import augment, colours, draws, kernels, vectors
from pipeline.draws import FLIP, PARAMETERS, PIXEL_PARAMETERS
from pipeline.kernels import resize
from pipeline.vectors import compiled

NUM_INPUTS, NUM_PARAMETERS = 3, len(PARAMETERS)
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


def kept_on_disk(function: Callable, *arguments: Any) -> Any:
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


# DALI passes addresses: of the data pointers, of the pointers to shapes, and of the numbers of dimensions.
def crop_entry(sources: str) -> Any:
    def run(
        outs: int, out_shapes: int, out_ndims: int, num_outs: int, ins: int, in_shapes: int, in_ndims: int, num_ins: int
    ) -> None:
        _ = sources
        data = carray(pointer(ins), NUM_INPUTS, np.int64)
        shapes = carray(pointer(in_shapes), NUM_INPUTS, np.int64)
        height, width = carray(pointer(shapes[0]), 2, np.int64)
        size = carray(pointer(shapes[2]), 1, np.int64)[0]
        out = carray(pointer(carray(pointer(outs), 1, np.int64)[0]), (3, size, size), np.uint8)
        image = carray(pointer(data[0]), (height, width, 3), np.uint8)
        make_crop(out, image, carray(pointer(data[1]), NUM_PARAMETERS, np.float32))

    return kept_on_disk(run, uint64, uint64, uint64, int32, uint64, uint64, uint64, int32)


def shape_entry(sources: str) -> Any:
    def set_shapes(
        out_shapes: int, out_ndims: int, num_outs: int, in_shapes: int, in_ndims: int, num_ins: int, batch_size: int
    ) -> None:
        _ = sources
        out = carray(pointer(out_shapes), batch_size, np.int64)
        sizes = carray(pointer(in_shapes), (NUM_INPUTS, batch_size), np.int64)[2]
        for i in range(batch_size):
            shape, size = carray(pointer(out[i]), 3, np.int64), carray(pointer(sizes[i]), 1, np.int64)[0]
            shape[0], shape[1], shape[2] = 3, size, size

    return kept_on_disk(set_shapes, uint64, uint64, int32, uint64, uint64, int32, int32)


MADE_FROM = digest(SOURCES)
RUN, SET_SHAPES = crop_entry(MADE_FROM), shape_entry(MADE_FROM)


class MakeCrop(NumbaFunction):
    """`op(image, values, ruler)`: `[H, W, 3] uint8`, `[12] float32` and `[S] uint8` -> `[3, S, S] uint8`.

    Only the shapes of the inputs are known when the output is allocated, so the length of `ruler` carries its size.
    """

    def __init__(self) -> None:
        kinds = [types.UINT8, types.FLOAT, types.UINT8]
        super().__init__(run_fn=None, out_types=[types.UINT8], in_types=kinds, outs_ndim=[3], ins_ndim=[3, 1, 1])

    def _get_run_fn_cpu(self, *_: Any) -> int:
        return RUN.address

    def _get_setup_fn_cpu(self, *_: Any) -> int:
        return SET_SHAPES.address
