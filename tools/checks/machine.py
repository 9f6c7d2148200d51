"""Checks of the machine: shared memory, disk, the run folder, the clock and the cores."""

import os
import resource
import time
from pathlib import Path

from pipeline.shards.storage import file_system
from tools.checks.check import Case, Finding, check, fail, ok, warn

SHARED_MEMORY = Path("/dev/shm")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
GIB = 2**30
LEAST_SHARED, LEAST_DISK, ENOUGH_DISK = 1 * GIB, 1 * GIB, 10 * GIB
LEAST_FILES = 1024
CLOCK_SKEW_S = 5.0


def free_bytes(folder: Path) -> int:
    """What this user may still write."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


@check("shared memory")
def shared_memory(_: Case) -> Finding:
    stat = os.statvfs(SHARED_MEMORY)
    size = stat.f_blocks * stat.f_frsize
    text = f"{SHARED_MEMORY} holds {size / GIB:.2f} GiB"
    if size < LEAST_SHARED:
        fix = "docker run --shm-size=8g (or --ipc=host); on Kubernetes an emptyDir of medium Memory at /dev/shm"
        return fail(f"{text}: NCCL needs up to a GiB between the GPUs of a machine", fix)
    return ok(text)


@check("run folder")
def run_folder(case: Case) -> Finding:
    """Writes, flushes and renames a file, as a checkpoint does."""
    fix = f'mount it writable for user {os.geteuid()} (chown, docker run --user "$(id -u)", -v without :ro), or --out'
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
        return fail(f"{case.out}: {error.strerror}: no checkpoint can be written", fix)
    return ok(f"{case.out}: writable, on {file_system(case.out) or 'an unknown file system'}")


@check("free disk")
def free_disk(case: Case) -> Finding:
    free = free_bytes(existing(case.out))
    text = f"{free / GIB:.1f} GiB are free for {case.out}"
    fix = "free some, lower checkpoint.keep_last_n, or write elsewhere: logging.run_dir=FOLDER"
    if free < LEAST_DISK:
        return fail(f"{text}: the first checkpoints fill it", fix)
    if free < ENOUGH_DISK:
        return warn(f"{text}: a checkpoint of ViT-B takes 1.5 GiB, and keep_last_n + 1 of them exist at a time", fix)
    return ok(text)


@check("clock")
def clock(case: Case) -> Finding:
    """The machine's clock against the file system's, which on a network is another machine's."""
    fix = "synchronise the clocks (chronyd or ntpd) of this machine and of the file server"
    now, newest = time.time(), Path(__file__).stat().st_mtime
    if newest - now > 86_400:
        return fail(f"it is {(newest - now) / 86_400:.0f} days before the code was written", fix)
    trial = existing(case.out) / f".doctor-clock-{os.getpid()}"
    try:
        trial.write_bytes(b"0")
        skew = trial.stat().st_mtime - time.time()
        trial.unlink()
    except OSError:
        return ok(time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    if abs(skew) > CLOCK_SKEW_S:
        return warn(f"{skew:+.0f} s between this machine and the file system of {case.out}", fix)
    return ok(f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {skew:+.2f} s from the run folder's")


def quota_cores() -> float:
    """The container's limit in cores; infinite without one."""
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if quota == "max" else int(quota) / int(period)


@check("cores and threads")
def cores(case: Case) -> Finding:
    from pipeline.dataset import default_threads, own_cores

    have, quota = own_cores(), quota_cores()
    given = case.config.data.num_workers if case.config is not None else "auto"
    threads = default_threads() if given == "auto" else given
    usable = min(have, quota)
    text = f"{have} cores{'' if quota == float('inf') else f', limited to {quota:g}'}; {threads} DALI threads"
    if threads > usable:
        best = max(1, int(usable) // 2)
        fix = f"data.num_workers={best}, or give the container more: docker run --cpus, Slurm --cpus-per-task"
        return warn(f"{text}: threads wait for cores", fix)
    return ok(text)


@check("open files")
def open_files(_: Case) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        fix = "docker run --ulimit nofile=65536, or LimitNOFILE of the service"
        return warn(f"{hard} files may be open: too few for many shards without mmap", fix)
    return ok(f"{soft} files may be open, {'without limit' if hard == resource.RLIM_INFINITY else hard} on request")
