"""Telling a failing device from a damaged image: DALI raises RuntimeError for both."""

import re

import torch

NO_MEMORY = re.compile(
    r"can't allocate|cudaErrorMemoryAllocation|CUDA allocation failed|ALLOC_FAILED|bad_alloc|out of memory",
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
