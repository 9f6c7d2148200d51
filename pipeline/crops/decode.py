"""Which images DALI's decoder refuses, and why."""

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.crops.device import DeviceError, device_fault
from pipeline.shards.index import ShardIndex


def find_faults(index: ShardIndex, rows: Iterable[int], device: str) -> dict[int, str]:
    """Those of the rows that DALI's decoder on `device` refuses, one by one, each with a reason in words.

    `device`: `cpu`, `gpu` or `gpu:NUMBER`. Raises DeviceError or torch.OutOfMemoryError when it is the device that fails.
    """
    check_decoder(device)
    faults = {}
    for row in rows:
        try:
            encoded = index.encoded(row)
        except OSError as error:
            faults[row] = f"cannot be read: {error}"
            continue
        if message := decode_error(encoded, device):
            sample = index.samples[row]
            reason = _reason(encoded, int(sample["width"]), int(sample["height"]))
            if reason is None and (fault := device_fault(message, device)):
                raise fault
            faults[row] = reason or f"DALI refuses it: {message.splitlines()[0]}"
    return faults


def check_decoder(device: str) -> None:
    """Raise DeviceError or torch.OutOfMemoryError unless `device` decodes a sound JPEG."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (60, 120, 180)).save(file, "JPEG")
    if message := decode_error(file.getvalue(), device):
        raise device_fault(message, device) or DeviceError(
            f"DALI's decoder does not work on {device}: {message.splitlines()[0]}. See python tools/doctor.py"
        )


def decode_error(encoded: bytes, device: str) -> str:
    """What DALI says of one image; "" when it decodes it."""
    # Only needed when something is broken, and slow to import.
    import nvidia.dali.experimental.dynamic as dali
    from nvidia.dali import types

    try:
        dali.decoders.image(np.frombuffer(encoded, np.uint8), device=device, output_type=types.RGB).evaluate()
    except (RuntimeError, ValueError) as error:
        return str(error).strip() or type(error).__name__
    return ""


def _reason(encoded: bytes, width: int, height: int) -> str | None:
    """Why Pillow does not take it for the image that the index describes; None when it does."""
    if not encoded:
        return "empty file"
    if not any(encoded):
        return "filled with zeros"
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except UnidentifiedImageError:
        return "not an image"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    if image.size != (width, height):
        return f"{image.width}x{image.height} pixels, the index has {width}x{height}"
    return None
