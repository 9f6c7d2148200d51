"""The crop kernel, compiled by NVRTC to machine code of the GPU at hand: no compiler needs to be installed."""

import ctypes
import hashlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline.crops.augment import GRAY_WEIGHTS, SOLARIZE_THRESHOLD
from pipeline.crops.cpu_operator import CACHE_FOLDER
from pipeline.crops.device import DeviceError
from pipeline.crops.kernels import ONE, SMALL_KERNEL_TAPS
from pipeline.files import write_atomic

SOURCE = Path(__file__).with_name("kernel.cu")
THREADS = 1024  # of a block; whole warps
STRIP = 8  # rows of a crop that are blurred at a time
DEFINITIONS = {
    "THREADS": THREADS, "STRIP": STRIP, "ONE": ONE, "SMALL_BLUR": SMALL_KERNEL_TAPS, "WHITE_FROM": SOLARIZE_THRESHOLD,
    **dict(zip(("RED", "GREEN", "BLUE"), GRAY_WEIGHTS, strict=True)),
}  # fmt: skip
OPTIONS = tuple(f"-D{name}={value!r}" for name, value in DEFINITIONS.items())


def binding(name: str) -> Any:
    """Return a module of cuda.bindings, which torch brings along. Raises DeviceError."""
    try:
        return import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise DeviceError(f"cuda.bindings does not load: {error}") from None


def checked(function: Callable, *arguments: Any) -> Any:
    """Call a function of cuda.bindings and return its results without the error code. Raises DeviceError."""
    try:
        code, *results = function(*arguments)
    except RuntimeError as error:  # there is no such library
        raise DeviceError(f"{function.__name__} failed: {str(error).splitlines()[0]}") from None
    if int(code):
        raise DeviceError(f"{function.__name__} failed with {code.name}")
    return results[0] if len(results) == 1 else results


def compile_kernel(architecture: str, *options: str) -> tuple[bytes, str]:
    """Return the cubin for `architecture`, such as `sm_90`, and NVRTC's log. Raises DeviceError."""
    # A cubin, not PTX: a driver refuses the PTX of a toolkit that is newer than itself.
    nvrtc = binding("nvrtc")
    program = checked(nvrtc.nvrtcCreateProgram, SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], [])
    given = [option.encode() for option in (f"--gpu-architecture={architecture}", "--std=c++17", *OPTIONS, *options)]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    log = bytes(checked(nvrtc.nvrtcGetProgramLogSize, program))
    checked(nvrtc.nvrtcGetProgramLog, program, log)
    if int(code):
        raise DeviceError(f"NVRTC does not compile the crop kernel for {architecture}: {' '.join(log.decode().split())[:200]}")
    cubin = bytes(checked(nvrtc.nvrtcGetCUBINSize, program))
    checked(nvrtc.nvrtcGetCUBIN, program, cubin)
    checked(nvrtc.nvrtcDestroyProgram, program)
    return cubin, log.decode().strip("\0\n ")


def cached_cubin(architecture: str) -> bytes:
    """Return the cubin for `architecture`, cached next to the CPU operator. Raises DeviceError."""
    key = hashlib.sha256(" ".join(OPTIONS).encode() + SOURCE.read_bytes()).hexdigest()[:24]
    path = Path(CACHE_FOLDER or "/dev/null") / f"kernel-{key}.{architecture}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    cubin, _ = compile_kernel(architecture)
    with suppress(OSError):  # nowhere to write: the next process compiles again
        write_atomic(path, cubin)
    return cubin


class CropKernel:
    """The kernel, loaded on a GPU. `shared_limit`: bytes of shared memory that a block can have there. Raises DeviceError."""

    def __init__(self, device: torch.device) -> None:
        self.device, properties = device, torch.cuda.get_device_properties(device)
        cubin, driver = cached_cubin(f"sm_{properties.major}{properties.minor}"), binding("driver")
        self.shared_limit: int = properties.shared_memory_per_block_optin
        torch.empty(1, device=device)  # makes torch's CUDA context, into which the driver then loads
        with torch.cuda.device(device):
            self._module = checked(driver.cuModuleLoadData, cubin)
            self._function = checked(driver.cuModuleGetFunction, self._module, b"make_crops")
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute, self._function, limit, self.shared_limit)
        self._launch = driver.cuLaunchKernel

    def launch(self, blocks: int, rows: int, columns: int, out: int, size: int, scratch: int, room: int) -> None:
        """Queue `make_crops` of kernel.cu on torch's current stream. `rows`, `out`, `scratch`: addresses; scratch 0: none."""
        kinds = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong)
        arguments, shared = ((rows, columns, out, size, scratch, room), kinds), 0 if scratch else room
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            checked(self._launch, self._function, blocks, 1, 1, THREADS, 1, 1, shared, stream, arguments, 0)

    def mark(self) -> torch.cuda.Event:
        """Return an event behind the work that is queued on torch's current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event
