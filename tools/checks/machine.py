"""Checks of the machine: shared memory, the run folder, cores, and the limit on open files."""

import os
import resource
from pathlib import Path

from pipeline.shards.storage import file_system
from tools.checks.check import Case, CheckList, Finding, fail, ok, warn

SHARED_MEMORY = Path("/dev/shm")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
GIB = 2**30
MIN_SHARED, MIN_DISK, AMPLE_DISK = 1 * GIB, 1 * GIB, 10 * GIB
MIN_FILES = 1024


def check_shared_memory(_: Case) -> Finding:
    stat = os.statvfs(SHARED_MEMORY)
    size = stat.f_blocks * stat.f_frsize
    text = f"{SHARED_MEMORY} holds {size / GIB:.2f} GiB"
    if size < MIN_SHARED:
        fix = "docker run --shm-size=8g (or --ipc=host); on Kubernetes an emptyDir of medium Memory at /dev/shm"
        return fail(f"{text}: NCCL needs up to a GiB between the GPUs of a machine", fix)
    return ok(text)


def check_run_folder(case: Case) -> Finding:
    """Write, flush and rename a file, as a checkpoint does, and look at the free space."""
    trial = case.out / f".doctor-{os.getpid()}"
    try:
        case.out.mkdir(parents=True, exist_ok=True)
        with trial.open("wb") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        renamed = trial.with_suffix(".renamed")
        trial.replace(renamed)
        renamed.unlink()
    except OSError as error:
        fix = (
            f'mount it writable for user {os.geteuid()} (chown, docker run --user "$(id -u)", -v without :ro), or --out'
        )
        return fail(f"{case.out}: {error.strerror}: no checkpoint can be written", fix)
    stat = os.statvfs(case.out)
    free = stat.f_bavail * stat.f_frsize
    text = f"{case.out}: writable, {free / GIB:.1f} GiB free on {file_system(case.out) or 'an unknown file system'}"
    fix = "free some space, lower checkpoint.keep_last_n, or write elsewhere: logging.run_dir=FOLDER"
    if free < MIN_DISK:
        return fail(f"{text}: the first checkpoints fill it", fix)
    if free < AMPLE_DISK:
        return warn(f"{text}: a checkpoint of ViT-B takes 1.5 GiB, and keep_last_n + 1 of them exist at a time", fix)
    return ok(text)


def quota_cores() -> float:
    """Return the container's limit in cores; infinity if there is none."""
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if quota == "max" else int(quota) / int(period)


def check_cores(case: Case) -> Finding:
    from pipeline.dataset import default_threads, own_cores

    cores, quota = own_cores(), quota_cores()
    setting = case.config.data.num_workers if case.config is not None else "auto"
    threads = default_threads() if setting == "auto" else setting
    usable = min(cores, quota)
    text = f"{cores} cores{'' if quota == float('inf') else f', limited to {quota:g}'}; {threads} DALI threads"
    if threads > usable:
        best = max(1, int(usable) // 2)
        fix = f"data.num_workers={best}, or give the container more: docker run --cpus, Slurm --cpus-per-task"
        return warn(f"{text}: threads wait for cores", fix)
    return ok(text)


def check_open_files(_: Case) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_FILES:
        fix = "docker run --ulimit nofile=65536, or LimitNOFILE of the service"
        return warn(f"{hard} files can be open: too few for many shards without mmap", fix)
    return ok(f"{soft} files can be open, {'without limit' if hard == resource.RLIM_INFINITY else hard} on request")


MACHINE_CHECKS: CheckList = (
    ("shared memory", check_shared_memory),
    ("run folder", check_run_folder),
    ("cores and threads", check_cores),
    ("open files", check_open_files),
)
