"""Checks of the machine and its data: shared memory, run folder, cores, GPUs and their driver, decoder, shards."""

import ctypes
import io
import os
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import write_atomic
from pipeline.memory import memory_limit
from pipeline.shards.copied import is_remote
from pipeline.shards.index import open_index, split_folder
from pipeline.text import plural
from tools.checks.check import GIB, INSTALL, Case, Finding, fail, failure, ok, skip, warn
from tools.checks.packages import FLAVOURS, installed_dalis

SHARED_MEMORY = Path("/dev/shm")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
MAX_CPU_PARAMETERS = 15e6  # of an encoder; a ViT-S has 22 M
MIN_SHARED, MIN_DISK, AMPLE_DISK = 1 * GIB, 1 * GIB, 10 * GIB
DRIVER = Path("/proc/driver/nvidia/version")
MIN_DRIVER = {12: (525, 60), 13: (580, 65)}  # by CUDA's major version, for Linux: the table of CUDA's release notes
SAMPLED_IMAGES = 32
MAX_DIFFERENCE = 4.0  # mean difference to Pillow, of 255: two JPEG decoders round differently
VIDEO_LIBRARY = "libnvcuvid.so.1"  # comes with the capability `video` of NVIDIA's container toolkit
VIDEO_FIX = "docker run --env NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"


def check_shared_memory(_: Case) -> Finding:
    size = shutil.disk_usage(SHARED_MEMORY).total
    text = f"{SHARED_MEMORY} holds {size / GIB:.2f} GiB"
    if size < MIN_SHARED:
        fix = "docker run --shm-size=8g (or --ipc=host); on Kubernetes an emptyDir of medium Memory at /dev/shm"
        return fail(f"{text}: NCCL needs up to a GiB between the GPUs of a machine", fix)
    return ok(text)


def check_run_folder(case: Case) -> Finding:
    """Write and rename a file, as a checkpoint does, and look at the free space."""
    trial = case.out / f".doctor-{os.getpid()}"
    try:
        case.out.mkdir(parents=True, exist_ok=True)
        write_atomic(trial, b"0" * 4096)
        trial.unlink()
    except OSError as error:
        user = 'chown, docker run --user "$(id -u)", -v without :ro'
        fix = f"mount it writable for user {os.geteuid()} ({user}), or --out"
        return fail(f"{case.out}: {error.strerror}: no checkpoint can be written", fix)
    free = shutil.disk_usage(case.out).free
    text = f"{case.out}: writable, {free / GIB:.1f} GiB free"
    if free < AMPLE_DISK:
        fix = "free some space, lower checkpoint.keep_last_n, or write elsewhere: logging.run_dir=FOLDER"
        report = fail if free < MIN_DISK else warn
        return report(f"{text}: a checkpoint of ViT-B takes 1.5 GiB, and keep_last_n + 1 of them exist at a time", fix)
    return ok(text)


def check_cores(case: Case) -> Finding:
    from pipeline.dataset import default_threads, own_cores

    usable: float = own_cores()
    with suppress(OSError, ValueError):  # no cgroup, or `max`
        quota, period = map(int, CGROUP_QUOTA.read_text().split())
        usable = min(usable, quota / period)
    setting = case.config.data.num_workers if case.config is not None else "auto"
    threads = default_threads() if setting == "auto" else setting
    cores = "1 core" if usable == 1 else f"{usable:g} cores"
    text = f"{cores}, {plural(threads, 'DALI thread')}, {memory_limit() / GIB:.1f} GiB of memory"
    if threads > usable:
        fix = "or give the container more: docker run --cpus, Slurm --cpus-per-task"
        return warn(f"{text}: threads wait for cores", f"data.num_workers={max(1, int(usable) // 2)}, {fix}")
    return ok(text)


def driver_version() -> str | None:
    """Return the version of the kernel module, which containers share, such as 580.65.06; None without one."""
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text() if DRIVER.exists() else "")
    return match and match[0]


def check_gpus(case: Case) -> Finding:
    """Check that torch sees GPUs, and that the driver is new enough for the CUDA of torch and of DALI."""
    import torch

    from train.build import build_encoder

    version = driver_version()
    cuda = max([int((torch.version.cuda or "0").split(".")[0]), *(FLAVOURS[name] for name in installed_dalis())])
    needed = MIN_DRIVER.get(cuda, (0, 0))
    if version is not None and tuple(map(int, version.split(".")[:2])) < needed:
        fix = f"install NVIDIA driver {needed[0]}.{needed[1]} or newer on the host"
        return fail(f"driver {version} is too old for CUDA {cuda} of torch or DALI", fix)
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus)
        return ok(f"{names}; driver {version or 'of an unknown version'}")
    if case.device == "gpu" or version is not None:
        fix = "docker run --gpus all (NVIDIA Container Toolkit), Slurm --gpus-per-node, CUDA_VISIBLE_DEVICES; or device=cpu"
        return fail(f"torch sees no GPU; driver {version or 'not loaded'}", fix)
    if case.config is not None and case.device == "auto":
        with torch.device("meta"):  # allocates nothing
            count = sum(parameter.numel() for parameter in build_encoder(case.config).parameters())
        if count > MAX_CPU_PARAMETERS:
            fix = "a machine with a GPU; a smaller encoder, as in configs/laptop.yaml; or device=cpu, if it is meant"
            return warn(f"no GPU, so that device: auto trains {count / 1e6:.0f} M parameters on the CPU", fix)
    return skip("no GPU, and none is asked for")


def check_decoder(case: Case) -> Finding:
    """Compare one photograph, decoded where the run decodes, with Pillow's pixels."""
    import torch
    from matplotlib import cbook
    from nvidia.dali import types
    from nvidia.dali.experimental.dynamic import decoders

    device = "gpu" if torch.cuda.is_available() and case.device != "cpu" else "cpu"
    content = Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).read_bytes()
    decoded = decoders.image(np.frombuffer(content, np.uint8), device=device, output_type=types.RGB)
    reference = Image.open(io.BytesIO(content)).convert("RGB")
    difference = np.abs(np.asarray(decoded.cpu()).astype(int) - np.asarray(reference)).mean()
    text = f"{difference:.2f} of 255 from Pillow on the {device.upper()}"
    if difference > MAX_DIFFERENCE:
        return fail(f"wrong pixels: {text}", INSTALL)
    try:
        if device == "gpu":
            ctypes.CDLL(VIDEO_LIBRARY)
    except OSError:
        return warn(f"{text}; the driver's {VIDEO_LIBRARY} is missing, so no JPEG engine can be used", VIDEO_FIX)
    return ok(text)


def check_shards(case: Case) -> Finding:
    """Open the training split, and decode some of its images with the training's decoder, on the CPU."""
    from pipeline.crops.device import find_faults

    if case.data is None:
        return skip("neither a CONFIG nor --data names shards")
    if is_remote(case.data):
        return skip(f"{case.data}: shards in a store are copied and checked when training starts")
    verify = f"python tools/make_shards.py verify {case.data}"
    try:
        index = open_index(split_folder(case.config.data.dataset if case.config else "custom", case.data, "train"))
        rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
        faults = find_faults(index, rows, "cpu")
    except (OSError, RuntimeError, ValueError) as error:
        return failure(error, verify)
    if faults:
        row, fault = next(iter(faults.items()))
        text = f"{len(faults)} of {len(rows)}: {index.describe(row)}: {fault}"
        return fail(text, f"copy the shard again, or convert again; all shards: {verify}")
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards; {len(rows)} of them decoded")
