"""Which images DALI's decoder refuses, and why."""

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.shards.index import ShardIndex


def find_faults(index: ShardIndex, rows: Iterable[int], device: str) -> dict[int, str]:
    """Those of the rows that DALI's decoder refuses, one by one, each with a reason in words."""
    # Only needed when something is broken, and slow to import.
    import nvidia.dali.experimental.dynamic as dali
    from nvidia.dali import types

    faults = {}
    for row in rows:
        try:
            encoded = index.encoded(row)
        except OSError as error:
            faults[row] = f"cannot be read: {error}"
            continue
        try:
            dali.decoders.image(np.frombuffer(encoded, np.uint8), device=device, output_type=types.RGB).evaluate()
        except (RuntimeError, ValueError) as error:
            faults[row] = _reason(encoded, str(error))
    return faults


def _reason(encoded: bytes, dali_error: str) -> str:
    if not encoded:
        return "empty file"
    if not any(encoded):
        return "filled with zeros"
    try:
        Image.open(io.BytesIO(encoded)).load()
    except UnidentifiedImageError:
        return "not an image"
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    return f"DALI refuses it: {dali_error.strip().splitlines()[0]}"
