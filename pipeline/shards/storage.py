"""Where shards lie: a folder of files, or a prefix in a store; and how the file system of a folder is best read."""

import os
import re
import resource
from pathlib import Path

from pipeline.shards import object_store
from pipeline.shards.object_store import is_remote

# File systems whose pages come over a network. Reads through a mapping go there page by page, plain reads in larger pieces.
NETWORK_TYPES = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs",
     "pvfs2", "smb3", "smbfs", "vboxsf", "wekafs")
)  # fmt: skip
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.mergerfs"})
MOUNTS = Path("/proc/self/mountinfo")
SPARE_FILES = 512  # for everything but shards: libraries, sockets, logs


def join(folder: Path | str, name: str) -> str:
    """The path or URL of `name` in a folder or under a prefix."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def read_file(place: Path | str) -> bytes:
    """Return the content of a file or object. Raises FileNotFoundError, StoreError, and ValueError for an unreadable file."""
    if is_remote(place):
        return object_store.read(str(place))
    try:
        return Path(place).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror}). Check its permissions") from None


def read_range(place: Path | str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file or object, fewer where it ends. Raises OSError."""
    if is_remote(place):
        return object_store.read_range(str(place), offset, size)
    with open(place, "rb") as file:
        return os.pread(file.fileno(), size, offset)


def resolve_use_mmap(use_mmap: bool | str, folder: Path | str) -> bool:
    """`auto` -> True if `folder` is on a local disk, where shards are best read through a memory mapping."""
    if isinstance(use_mmap, bool):
        return use_mmap
    kind = file_system(folder)
    return kind in LOCAL_FUSE or kind.partition(".")[0] not in NETWORK_TYPES


def file_system(folder: Path | str) -> str:
    """The type of the file system that holds `folder` (`ext4`, `nfs4`, `fuse.sshfs`), "" if the system does not say."""
    path = os.path.realpath(folder)
    best, kind = "", ""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        left, _, right = line.partition(" - ")
        # A mount point's blanks are written in octal: "\040".
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two mounts at one point the later one is on top
            best, kind = point, right.split(" ")[0]
    return kind


def allow_open_files(count: int) -> None:
    """Let this process open `count` files more than the usual few hundred. Raises ValueError if the system forbids it."""
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"reading the shards needs {needed} open files and this system allows {hard}. Raise it "
                "(`ulimit -Hn`, or LimitNOFILE of the service), or set data.use_mmap=true"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
