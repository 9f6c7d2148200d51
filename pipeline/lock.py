"""Locks between processes. `exclusive` is for a folder that has one writer at a time, and tells the second who the first is."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

PATIENCE_S, POLL_S = 2.0, 0.05  # the children of a killed holder hold its lock for a moment longer
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system has none

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock on the file `path`, which is created if needed, and hold it while open. Raises OSError."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path, remedy: str, name: str = ".lock") -> Iterator[None]:
    """Be the only writer of `folder` while open. Raises ValueError naming the present one, and `remedy`; or OSError.

    The lock is an flock on the file `name`, which says who holds it. The kernel drops it when its holder ends, in whatever way.
    Between machines it works where the file system passes locks on: NFS, CephFS, GPFS and Lustre do, unless mounted with
    `nolock`, `local_lock` or `localflock`. On a file system without locks, a warning says so and nothing is locked.
    """
    descriptor = _open(folder / name)
    try:
        _acquire(descriptor, folder, remedy)
        with suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.ftruncate(descriptor, 0)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file for writing, which NFS asks for, but not through a link that somebody has put in its place."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _acquire(descriptor: int, folder: Path, remedy: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip() or "another process"
                raise ValueError(f"{folder}: in use by {holder}. Wait for it, stop it, or {remedy}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return log.warning(f"{folder}: cannot be locked ({error.strerror}): take care that only one command writes there")
        time.sleep(POLL_S)
