"""Checks of the driver, of DALI's decoders and of communication between ranks. Parts that need a GPU are skipped without one."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.checks.check import INSTALL, Case, CheckList, Finding, fail, ok, sees_gpu, skip, warn
from tools.checks.packages import FLAVOURS, flavour, library_exists, packages_folder

DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {12: (525, 60), 13: (580, 65)}  # by CUDA's major version, for Linux: the table of CUDA's release notes
DECODE_TOLERANCE = 4.0  # mean difference to Pillow, of 255: two JPEG decoders round differently
VIDEO_LIBRARY = "libnvcuvid.so.1"  # comes with the capability `video` of NVIDIA's container toolkit
VIDEO_FIX = "docker run --env NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"


def driver_version() -> str | None:
    """Return the version of the kernel module, which containers share, such as 580.65.06; None without one."""
    try:
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return None
    return match.group() if match else None


def check_gpus(case: Case) -> Finding:
    """Check that torch sees GPUs, and that the driver is new enough for the CUDA of torch and of DALI."""
    import torch

    version = driver_version()
    if version is not None:
        needs = {f"torch {torch.__version__}": int((torch.version.cuda or "0").split(".")[0])}
        if (name := flavour()) is not None:
            needs[name] = FLAVOURS[name][1]
        release = tuple(int(part) for part in version.split(".")[:2])
        old = {user: cuda for user, cuda in needs.items() if release < OLDEST_DRIVER.get(cuda, (0, 0))}
        if old:
            users = ", ".join(f"{user} (CUDA {cuda})" for user, cuda in old.items())
            needed = ".".join(map(str, OLDEST_DRIVER[max(old.values())]))
            return fail(
                f"driver {version} is too old for {users}", f"install NVIDIA driver {needed} or newer on the host"
            )
    if sees_gpu():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
        return ok(f"{names}; driver {version or 'of an unknown version'}")
    if case.needs_gpu:
        fix = "docker run --gpus all (NVIDIA Container Toolkit), Slurm --gpus-per-node, CUDA_VISIBLE_DEVICES; or device=cpu"
        return fail("device: gpu, and torch sees none", fix)
    if version is not None:
        fix = "docker run --gpus all; unset CUDA_VISIBLE_DEVICES"
        return fail(f"driver {version} is loaded, but torch sees no GPU", fix)
    return skip("no GPU")


def decode_difference(device: str, hw_decoder_load: float = 0.0) -> float:
    """Return the mean of |DALI - Pillow| over the pixels of one photograph, of 255. `device` is cpu or mixed."""
    from matplotlib import cbook
    from nvidia.dali import Pipeline, fn, types

    content = Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).read_bytes()
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


def check_decoder(case: Case) -> Finding:
    """Compare one photograph, decoded where the run decodes, with Pillow's pixels; on a GPU also by its JPEG engine, if any."""
    has_engine = case.uses_gpu and library_exists(VIDEO_LIBRARY, packages_folder())
    difference = decode_difference("mixed" if case.uses_gpu else "cpu")
    if has_engine:
        difference = max(difference, decode_difference("mixed", hw_decoder_load=1.0))
    text = f"{difference:.2f} of 255 from Pillow on the {'GPU' if case.uses_gpu else 'CPU'}"
    if difference > DECODE_TOLERANCE:
        return fail(f"wrong pixels: {text}", INSTALL)
    if case.uses_gpu and not has_engine:
        return warn(f"{text}; the driver's {VIDEO_LIBRARY} is missing, so no JPEG engine can be used", VIDEO_FIX)
    return ok(text)


def check_all_reduce(_: Case) -> Finding:
    """Sum over all GPUs of this machine."""
    if not sees_gpu():
        return skip("no GPU")
    import torch

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


GPU_CHECKS: CheckList = (("GPUs", check_gpus), ("decoder", check_decoder), ("all-reduce", check_all_reduce))
