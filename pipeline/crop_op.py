"""`kernels.make_crop` as a DALI operator: DALI's threads call the compiled code, without the interpreter.

DALI's own Numba plugin compiles its generic glue again in every process, for five seconds and more. Here the two entry points
that it hands to DALI are written out, so that their machine code is kept on disk, and only its operator class is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc
from numba.core.types import int32, uint64, void
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction
from nvidia.dali.plugin.numba import address_as_void_pointer as pointer  # type: ignore[attr-defined]

from pipeline.kernels import PARAMETERS, kept_on_disk, make_crop

NUM_INPUTS, NUM_PARAMETERS = 3, len(PARAMETERS)


def entry_point(*arguments: Any) -> Callable[[Callable], Any]:
    """Compile a function that C calls with arguments of these types."""
    return lambda function: kept_on_disk(cfunc, function, void(*arguments))


# DALI passes addresses: of the data pointers, of the pointers to shapes, and of the numbers of dimensions.
@entry_point(uint64, uint64, uint64, int32, uint64, uint64, uint64, int32)
def _run(
    outs: int, out_shapes: int, out_ndims: int, num_outs: int, ins: int, in_shapes: int, in_ndims: int, num_ins: int
) -> None:
    data = carray(pointer(ins), NUM_INPUTS, np.int64)
    shapes = carray(pointer(in_shapes), NUM_INPUTS, np.int64)
    height, width = carray(pointer(shapes[0]), 2, np.int64)
    size = carray(pointer(shapes[2]), 1, np.int64)[0]
    out = carray(pointer(carray(pointer(outs), 1, np.int64)[0]), (3, size, size), np.uint8)
    image = carray(pointer(data[0]), (height, width, 3), np.uint8)
    make_crop(out, image, carray(pointer(data[1]), NUM_PARAMETERS, np.float32))


@entry_point(uint64, uint64, int32, uint64, uint64, int32, int32)
def _set_shapes(
    out_shapes: int, out_ndims: int, num_outs: int, in_shapes: int, in_ndims: int, num_ins: int, batch_size: int
) -> None:
    out = carray(pointer(out_shapes), batch_size, np.int64)
    sizes = carray(pointer(in_shapes), (NUM_INPUTS, batch_size), np.int64)[2]
    for i in range(batch_size):
        shape, size = carray(pointer(out[i]), 3, np.int64), carray(pointer(sizes[i]), 1, np.int64)[0]
        shape[0], shape[1], shape[2] = 3, size, size


class MakeCrop(NumbaFunction):
    """`op(image, values, ruler)`: `[H, W, 3] uint8`, `[12] float32` and `[S] uint8` -> `[3, S, S] uint8`.

    Only the shapes of the inputs are known when the output is allocated, so the length of `ruler` carries its size.
    """

    def __init__(self) -> None:
        kinds = [types.UINT8, types.FLOAT, types.UINT8]
        super().__init__(run_fn=None, out_types=[types.UINT8], in_types=kinds, outs_ndim=[3], ins_ndim=[3, 1, 1])

    def _get_run_fn_cpu(self, *_: Any) -> int:
        return _run.address

    def _get_setup_fn_cpu(self, *_: Any) -> int:
        return _set_shapes.address
