"""Bad samples and bad devices: DALI raises RuntimeError for both, and only bad samples are replaced."""

import io
import re
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from pipeline.shards.index import ShardIndex
from pipeline.text import notify_after

# The words of torch, DALI, CUDA, cuBLAS and nvJPEG. DALI's std::bad_alloc reaches Python as a MemoryError.
NO_MEMORY = re.compile(
    r"out.of.memory|can't allocate|CUDA allocation failed|cudaErrorMemoryAllocation|ALLOC_FAILED|allocator_failure|bad_alloc",
    re.IGNORECASE,
)
NO_DEVICE = re.compile(
    r"CUDA (runtime|driver) API error|cudaError\w|CUDA_ERROR_|libcuda|CUDA is not available|nvml|CUBLAS_", re.IGNORECASE
)
BOILERPLATE = "Current pipeline object is no longer valid."


class DeviceError(ValueError):
    """The GPU, its driver or its decoder does not work; the images are not the cause."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for any way in which torch, DALI or CUDA reports that the device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(NO_MEMORY.search(str(error)))


def as_device_error(dali_error: str, device: str) -> Exception | None:
    """Return DALI's message about the device as an `OutOfMemoryError` or DeviceError of one line; None if it is not about it."""
    reason = " ".join(dali_error.split("encountered:")[-1].replace(BOILERPLATE, "").split())[:300].rstrip(".")
    if NO_MEMORY.search(dali_error):
        return torch.OutOfMemoryError(f"DALI is out of memory on {device}: {reason}. Lower data.batch_size or data.prefetch")
    if NO_DEVICE.search(dali_error):
        return DeviceError(
            f"DALI cannot use {device}: {reason}. Check the driver with nvidia-smi and python tools/doctor.py, or set device=cpu"
        )
    return None


def check_decoder(device: str) -> None:
    """Raise DeviceError or torch.OutOfMemoryError unless DALI decodes a sound JPEG on `device` (`cpu`, `gpu`, `gpu:NUMBER`)."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (60, 120, 180)).save(file, "JPEG")
    if message := decode_error(file.getvalue(), device):
        raise as_device_error(message, device) or DeviceError(
            f"DALI's decoder does not work on {device}: {message.splitlines()[0]}. See python tools/doctor.py"
        )


@cache
def choose_crop_device(sizes: tuple[int, ...], device_id: int) -> tuple[str, str]:
    """Return the best crop device that works on GPU `device_id`, and a line if it is not `gpu`. Raises torch.OutOfMemoryError."""
    works, instead = "cpu", "crops are made on the cpu, not on the gpu"
    try:
        check_decoder(f"gpu:{device_id}")
        works, instead = "dali", "crops are made by DALI's operators, not by the project's kernel"
        with notify_after(3, "compiling the crops for this processor: some seconds"):
            from pipeline.crops.fused import load_kernel, self_check  # here, because only this choice needs the compiler
        self_check(sizes, load_kernel(device_id))
    except DeviceError as error:
        return works, f"{instead}: {error}"
    return "gpu", ""


def find_faults(index: ShardIndex, rows: Iterable[int], device: str) -> dict[int, str]:
    """Decode the rows one by one on `device`; return those that fail, each with a reason in words.

    Raises DeviceError or torch.OutOfMemoryError when the device fails, and not the image, and OSError when the storage does.
    """
    check_decoder(device)
    faults = {}
    for row in rows:
        encoded = index.encoded(row)
        if message := decode_error(encoded, device):
            sample = index.samples[row]
            reason = _damage(encoded, int(sample["width"]), int(sample["height"]))
            # An image that Pillow opens can fail for the device's sake.
            if reason is None and (failure := as_device_error(message, device)):
                raise failure
            faults[row] = reason or f"DALI refuses it: {message.splitlines()[0]}"
    return faults


def decode_error(encoded: bytes, device: str) -> str:
    """Return DALI's message about one image; "" when it decodes it."""
    # Only needed when something is broken, and slow to import.
    import nvidia.dali.experimental.dynamic as dali
    from nvidia.dali import types

    try:
        dali.decoders.image(np.frombuffer(encoded, np.uint8), device=device, output_type=types.RGB).evaluate()
    except (RuntimeError, ValueError) as error:
        return str(error).strip() or type(error).__name__
    return ""


def _damage(encoded: bytes, width: int, height: int) -> str | None:
    """Return why Pillow cannot read the image as one of `width` x `height` pixels; None when it can."""
    if not any(encoded):
        return "filled with zeros" if encoded else "empty file"
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
