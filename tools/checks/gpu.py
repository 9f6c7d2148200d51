"""Checks of GPUs: driver, decoding, communication and compilation. Without a GPU they are skipped."""

import ctypes
import io
import re
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.checks.check import LOCKED, Case, Finding, check, fail, ok, sees_gpu, skipped, warn
from tools.checks.packages import CUDA_12, FLAVOURS, flavour, is_found, packages_folder

DRIVER = Path("/proc/driver/nvidia/version")
# The oldest Linux driver of each CUDA: the table of CUDA's release notes.
OLDEST_DRIVER = {12: (525, 60), 13: (580, 65)}
DECODE_TOLERANCE = 4.0  # mean of |difference| to Pillow, of 255: two JPEG decoders round differently
NO_GPU = "no GPU"
VIDEO_LIBRARY = "libnvcuvid.so.1"  # comes with the capability `video` of NVIDIA's container toolkit
VIDEO_FIX = "docker run --env NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
HARDWARE_BACKEND = 3  # NVJPEG_BACKEND_HARDWARE of nvjpeg.h


def driver_version() -> str | None:
    """Of the kernel module, which containers share, as in 580.65.06; None without one."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return None
    return found.group() if found else None


def cuda_needs() -> dict[str, int]:
    """The major version of CUDA that torch and DALI are built for."""
    import torch

    needs = {f"torch {torch.__version__}": int((torch.version.cuda or "0").split(".")[0])}
    if (name := flavour()) is not None:
        needs[name] = FLAVOURS[name][1]
    return needs


@check("driver")
def driver(_: Case) -> Finding:
    version = driver_version()
    if version is None:
        return skipped("no NVIDIA driver")
    release = tuple(int(part) for part in version.split(".")[:2])
    too_old = {who: cuda for who, cuda in cuda_needs().items() if release < OLDEST_DRIVER.get(cuda, (0, 0))}
    if too_old:
        newest = max(too_old.values())
        needed = ".".join(map(str, OLDEST_DRIVER[newest]))
        listed = ", ".join(f"{who} (CUDA {cuda})" for who, cuda in too_old.items())
        return fail(f"{version} is too old for {listed}", f"install NVIDIA driver {needed} or newer on the host")
    return ok(f"{version}, new enough for {', '.join(f'{who} (CUDA {cuda})' for who, cuda in cuda_needs().items())}")


@check("GPUs")
def gpus(case: Case) -> Finding:
    import torch

    if sees_gpu():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ok(", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in found))
    if case.needs_gpu:
        fix = "docker run --gpus all (NVIDIA Container Toolkit), Slurm --gpus-per-node, CUDA_VISIBLE_DEVICES; or device=cpu"
        return fail("device: gpu, and torch sees none", fix)
    if driver_version() is not None:
        return fail("a driver is loaded, but torch sees no GPU", "docker run --gpus all; unset CUDA_VISIBLE_DEVICES")
    return skipped(NO_GPU)


def real_jpeg() -> bytes:
    """A photograph from matplotlib's package."""
    from matplotlib import cbook

    return Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).read_bytes()


def decode_difference(device: str, hw_decoder_load: float = 0.0) -> float:
    """Mean of |DALI - Pillow| over the pixels of one photograph, of 255. `device`: cpu or mixed."""
    from nvidia.dali import Pipeline, fn, types

    content = real_jpeg()
    options: dict[str, Any] = {"hw_decoder_load": hw_decoder_load} if device == "mixed" else {}
    graph = Pipeline(1, num_threads=1, device_id=0 if device == "mixed" else None, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(lambda: [np.frombuffer(content, np.uint8)], dtype=types.UINT8, ndim=1)
        graph.set_outputs(fn.decoders.image(encoded, device=device, output_type=types.RGB, **options))
    graph.build()
    output = graph.run()[0]
    pixels = np.asarray((output.as_cpu() if device == "mixed" else output)[0])
    reference = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return float(np.abs(pixels.astype(int) - reference).mean()) if pixels.shape == reference.shape else 255.0


def judged(difference: float) -> Finding:
    text = f"one photograph, {difference:.2f} of 255 from Pillow's"
    return ok(text) if difference <= DECODE_TOLERANCE else fail(f"wrong pixels: {text}", LOCKED)


@check("CPU decode")
def cpu_decode(_: Case) -> Finding:
    return judged(decode_difference("cpu"))


def jpeg_engines() -> tuple[int, int] | None:
    """Engines and cores in each, as nvJPEG reports them; None where its hardware backend does not start."""
    library = f"libnvjpeg.so.{FLAVOURS[flavour() or CUDA_12][1]}"
    nvjpeg = ctypes.CDLL(str(next(packages_folder().glob(f"*/lib/{library}"), library)))
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    if nvjpeg.nvjpegCreateEx(HARDWARE_BACKEND, None, None, 0, ctypes.byref(handle)):
        return None
    failed = nvjpeg.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    nvjpeg.nvjpegDestroy(handle)
    return None if failed or not engines.value else (engines.value, cores.value)


@check("GPU decode")
def gpu_decode(_: Case) -> Finding:
    return judged(decode_difference("mixed", 0.0)) if sees_gpu() else skipped(NO_GPU)


@check("GPU decode, JPEG engine")
def jpeg_engine(_: Case) -> Finding:
    import torch

    if not sees_gpu():
        return skipped(NO_GPU)
    if not is_found(VIDEO_LIBRARY, packages_folder()):
        return warn(f"{VIDEO_LIBRARY} of the driver is missing: the GPU's cores decode the JPEGs", VIDEO_FIX)
    if (engines := jpeg_engines()) is None:
        return ok(f"{torch.cuda.get_device_name()} has none that nvJPEG can use: its cores decode the JPEGs")
    finding = judged(decode_difference("mixed", 1.0))
    return replace(finding, text=f"{engines[0]} engine(s) with {engines[1]} cores each; {finding.text}")


@check("where crops are made")
def crop_device(case: Case) -> Finding:
    """By the settings, and by whether DALI decodes on the GPU."""
    from pipeline.crops.device import DeviceError, check_decoder

    data, on_cpu = case.config.data if case.config is not None else None, "on the CPU, by the compiled operator"
    wanted = data.crop_device if data is not None else "auto"
    if not sees_gpu():
        return skipped(NO_GPU) if case.needs_gpu else ok(on_cpu)
    if case.config is not None and case.config.device == "cpu":
        return ok(f"{on_cpu}; device is cpu")
    uploaded = f"{on_cpu}, and uploaded"
    if wanted == "cpu":
        return ok(f"{uploaded}; data.crop_device is cpu")
    try:
        check_decoder("gpu")
    except (DeviceError, RuntimeError) as error:
        if wanted == "gpu":
            return fail(f"data.crop_device is gpu: {error}", "data.crop_device=auto, until the GPU decodes")
        return warn(f"{uploaded}: {error}", "if the GPU is to make them, fix what GPU decode reports")
    if wanted == "gpu":
        return ok("on the GPU; data.crop_device is gpu")
    return ok("on the GPU or on the CPU: each run measures at its start which feeds its model faster")


@check("all-reduce, gloo")
def gloo(_: Case) -> Finding:
    """Two ranks of this process, over the network interface that gloo chooses for this machine's name."""
    import torch
    import torch.distributed as dist

    store, sums, errors = dist.HashStore(), [torch.ones(4), torch.ones(4)], []

    def rank(number: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=5))
            group.allreduce([sums[number]]).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            errors.append(str(error).splitlines()[0])

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    if errors or any(values.tolist() != [2.0] * 4 for values in sums):
        fix = "GLOO_SOCKET_IFNAME=INTERFACE (see `ip address`), and this machine's name in DNS or /etc/hosts"
        return fail(f"two ranks cannot communicate: {errors[0] if errors else 'no answer'}", fix)
    return ok("two ranks on this machine")


@check("all-reduce, NCCL")
def nccl(_: Case) -> Finding:
    import torch

    if not sees_gpu():
        return skipped(NO_GPU)
    count = torch.cuda.device_count()
    values = [torch.ones(2**20, device=f"cuda:{i}") for i in range(count)]
    try:
        torch.cuda.nccl.all_reduce(values)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return fail(f"{count} GPUs: {str(error).splitlines()[0]}", "NCCL_DEBUG=INFO shows why; see shared memory above")
    if any(float(value[0]) != count for value in values):
        return fail(f"{count} GPUs: wrong sums", "NCCL_P2P_DISABLE=1; if that helps, IOMMU or ACS is in the way")
    return ok(f"{count} GPUs, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")


@check("torch.compile")
def compiles(case: Case) -> Finding:
    import torch

    if not case.compiles:
        return skipped("training.compile is false")
    values = torch.linspace(0, 1, 256, device="cuda" if sees_gpu() else "cpu")
    compiled = torch.compile(lambda x: (x.sin() * 2).sum())
    try:
        difference = float((compiled(values) - (values.sin() * 2).sum()).abs())
    except RuntimeError as error:
        fix = "a C compiler and a writable TORCHINDUCTOR_CACHE_DIR; or training.compile=false"
        return fail(str(error).splitlines()[0], fix)
    return ok("a small function") if difference < 1e-3 else fail(f"off by {difference}", "training.compile=false")
