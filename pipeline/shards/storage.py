"""Where shards lie: a folder of files, or a prefix in a store; and how their file system wants to be read."""

import os
import re
import resource
from pathlib import Path

from pipeline.shards import object_store

# File systems whose pages come over a network. Reads through a mapping go there page by page, plain reads in larger pieces.
NETWORK_TYPES = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs",
     "pvfs2", "smb3", "smbfs", "vboxsf", "wekafs")
)  # fmt: skip
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.mergerfs"})
MOUNTS = Path("/proc/self/mountinfo")


def join(folder: Path | str, name: str) -> str:
    """The place of `name` in a folder or under a prefix."""
    if isinstance(folder, str) and object_store.is_remote(folder):
        return f"{folder.rstrip('/')}/{name}"
    return os.path.join(folder, name)


def read_range(place: str, offset: int, size: int) -> bytes:
    """`size` bytes of a shard, fewer when the file ends before. Raises OSError."""
    if object_store.is_remote(place):
        return object_store.read_range(place, offset, size)
    with open(place, "rb") as file:
        return os.pread(file.fileno(), size, offset)


def resolve_use_mmap(use_mmap: bool | str, folder: Path | str) -> bool:
    """`auto` -> whether shards in `folder` are best read through a memory mapping: on local disks, not over a network."""
    if isinstance(use_mmap, bool):
        return use_mmap
    kind = file_system(folder)
    return kind in LOCAL_FUSE or kind.partition(".")[0] not in NETWORK_TYPES


def file_system(folder: Path | str) -> str:
    """The type of the file system that `folder` lies on (`ext4`, `nfs4`, `fuse.sshfs`), "" where the system does not say."""
    place = os.path.realpath(folder)
    best, kind = "", ""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        left, _, right = line.partition(" - ")
        # A mount point's blanks are written in octal: "\040".
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two mounts at one place the later one is on top
            best, kind = point, right.split(" ")[0]
    return kind


def allow_open_files(count: int) -> None:
    """Let this process hold `count` files more than the usual few hundred. Raises ValueError where the system forbids it."""
    needed = count + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"reading the shards needs {needed} open files and this system allows {hard}. Raise it "
                "(`ulimit -Hn`, or LimitNOFILE of the service), or set data.use_mmap=true"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
