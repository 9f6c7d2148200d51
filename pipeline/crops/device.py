"""Telling a failing device from a damaged image: DALI raises RuntimeError for both."""

import re

import torch

# What torch, DALI, CUDA, cuBLAS and nvJPEG say. DALI's std::bad_alloc reaches Python as a MemoryError.
NO_MEMORY = re.compile(
    r"out.of.memory|can't allocate|CUDA allocation failed|cudaErrorMemoryAllocation|ALLOC_FAILED|allocator_failure|bad_alloc",
    re.IGNORECASE,
)
NO_DEVICE = re.compile(
    r"CUDA (runtime|driver) API error|cudaError\w|CUDA_ERROR_|libcuda|CUDA is not available|nvml|CUBLAS_", re.IGNORECASE
)

USELESS = "Current pipeline object is no longer valid."


class DeviceError(ValueError):
    """The GPU, its driver or its decoder does not work: no image is at fault."""


def device_fault(dali_error: str, device: str) -> Exception | None:
    """What DALI's message says of the device, as an exception of one line: `torch.OutOfMemoryError` or DeviceError."""
    reason = dali_error.split("encountered:")[-1].replace(USELESS, "")
    line = " ".join(reason.split())[:300].rstrip(".")
    if NO_MEMORY.search(dali_error):
        return torch.OutOfMemoryError(
            f"DALI is out of memory on {device}: {line}. Lower data.batch_size or data.prefetch"
        )
    if NO_DEVICE.search(dali_error):
        return DeviceError(
            f"DALI cannot use {device}: {line}. Check the driver with nvidia-smi and python tools/doctor.py, or set device=cpu"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """True for any way in which torch, DALI or CUDA reports that the device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(NO_MEMORY.search(str(error)))
