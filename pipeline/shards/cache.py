"""A cache of whole shards on a local disk, shared by all processes of a machine.

The kernel's file locks are its only state, so a killed process leaves nothing behind: a lock on the shard's file while it is in
use, one on a file beside it while it is fetched, and one on the folder while room is made.
"""

import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.shards.check import shard_fault
from pipeline.shards.object_store import StoreError, download, repeated

POLL_S = 0.02
ROOM_S = 20.0  # of waiting for other processes to leave their shards
LEAST_RETRY_S = 10.0  # of asking a store that did not answer another process, which this one waited for
FULL = (errno.ENOSPC, errno.EDQUOT)
# The names of shards and of those on their way. A folder that the user chose may hold other files, which are left alone.
SHARD_FILE = re.compile(r".+-[0-9a-f]{24}\.tar")
PARTIAL_FILE = re.compile(r"\.(.+-[0-9a-f]{24}\.tar)\.(\d+)\.partial")


@dataclass(frozen=True)
class CacheSettings:
    """`folder`: None for one of this user's in the temporary folder. `retry_s`: how long a failing store is asked again.
    `streams`: downloads at once of one process; more of them make the next shard come later where they share the line."""

    folder: Path | None = None
    max_bytes: int = 100 * 10**9
    retry_s: float = 120.0
    streams: int = 2

    @property
    def place(self) -> Path:
        return self.folder or Path(tempfile.gettempdir()) / f"multicrop-hjepa-{os.getuid()}"


@dataclass(frozen=True)
class StoredShard:
    """A shard in a store. `name`: in the cache, as SHARD_FILE; other for other content. `num_bytes`: its size, or at least so
    much without a manifest. `sha256`: "" without one. `pair`: `[2]` of SAMPLE_DTYPE, its first and last sample."""

    url: str
    name: str
    num_bytes: int
    sha256: str
    pair: np.ndarray


class NoRoom(Exception):
    """There is no room in the cache, or on its disk, that nobody uses."""


class WrongContent(OSError):
    """A whole download is not what the manifest or the index says."""


class Lease:
    """While it lives, no process removes the shard from the cache."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


class ShardCache:
    """Whole shards, at most `max_bytes` of them; where more are needed, the one least recently planned goes first."""

    def __init__(self, settings: CacheSettings) -> None:
        self.folder, self.max_bytes = settings.place, settings.max_bytes
        self.retry_s, self.streams = settings.retry_s, settings.streams
        self._locks = self.folder / "locks"

    def make(self) -> None:
        """Raises ValueError where the folder cannot be made."""
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir: {self.folder} cannot be made ({error.strerror}); choose another"
            ) from None

    def path(self, shard: StoredShard) -> Path:
        return self.folder / shard.name

    def hold(self, shard: StoredShard) -> Lease | None:
        """Plan a shard that is in the cache; None when it is not."""
        try:
            descriptor = os.open(self.path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        lease = Lease(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            mine, there = os.fstat(descriptor), os.stat(self.path(shard))
        except (BlockingIOError, FileNotFoundError):
            return None  # it is being removed
        if mine.st_ino != there.st_ino or not _has_size(shard, mine.st_size):
            return None
        os.utime(self.path(shard))
        return lease

    def fetch(self, shard: StoredShard, patient: bool = True) -> Lease:
        """The shard, downloaded by one process while the others wait.

        Raises StoreError; and NoRoom unless `patient`, which waits for other processes to leave theirs.
        """
        wrong: list[OSError] = []
        asked = time.monotonic()

        def ask(fresh: bool) -> None:
            try:
                self._download(shard, fresh)
            except WrongContent as error:
                wrong.append(error)
                if len(wrong) == 2:  # the first may have been damaged on its way
                    raise StoreError(f"{shard.url}: {error}. Upload it again, with its index and manifest") from None
                raise

        with _locked(self._locks / shard.name):
            started = time.monotonic()
            # Many ranks that wait for each other are not to try for so long one after the other.
            retry_s = max(min(LEAST_RETRY_S, self.retry_s), self.retry_s - (started - asked))
            while True:
                if lease := self.hold(shard):
                    return lease
                try:
                    repeated(ask, shard.url, retry_s)
                except NoRoom as error:
                    if not patient:
                        raise
                    if time.monotonic() - started > ROOM_S:
                        raise StoreError(f"{shard.url}: {error}") from None
                    time.sleep(POLL_S)

    def _download(self, shard: StoredShard, fresh: bool) -> None:
        partial = self.folder / f".{shard.name}.{shard.num_bytes}.partial"
        self._make_room(shard, partial)
        try:
            download(shard.url, partial, fresh)
            self._check(shard, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(self.path(shard))
        except OSError as error:
            if error.errno in FULL:
                raise NoRoom(self._full_disk(shard)) from None
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _check(self, shard: StoredShard, path: Path) -> None:
        """Raise OSError for a download that was cut off, WrongContent for other bytes than the manifest's or the index's."""
        size = path.stat().st_size
        if size < shard.num_bytes:
            raise OSError(f"ended after {size:,} of {shard.num_bytes:,} bytes")
        if not shard.sha256:
            if fault := shard_fault(str(path), shard.pair):
                raise WrongContent(fault.removeprefix(f"{path}: ").removesuffix(". Copy it again"))
            return
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise WrongContent("its sha256 is not that of manifest.json: changed in the store, or damaged")

    def _make_room(self, shard: StoredShard, partial: Path) -> None:
        """Remove shards until this one fits, and reserve its bytes by the name of its file. Raises NoRoom."""
        with _locked(self.folder / "locks" / ".folder"):
            there, reserved, to_come = self._contents()
            used = sum(size for _, size, _ in there) + reserved
            disk = os.statvfs(self.folder)
            free = disk.f_bavail * disk.f_frsize - to_come
            for _, size, path in sorted(there):
                if used + shard.num_bytes <= self.max_bytes and shard.num_bytes <= free:
                    break
                if _remove(path):
                    used, free = used - size, free + size
            if used + shard.num_bytes > self.max_bytes:
                raise NoRoom(
                    f"its {shard.num_bytes / 1e9:,.2f} GB do not fit beside the {used / 1e9:,.2f} GB of shards in use into "
                    f"data.cache_size_gb {self.max_bytes / 1e9:g}. Raise it"
                )
            if shard.num_bytes > free:
                raise NoRoom(self._full_disk(shard))
            partial.touch()

    def _contents(self) -> tuple[list[tuple[float, int, Path]], int, int]:
        """(when planned, size, path) of each shard; the bytes reserved for those on their way, and how many are still to come."""
        there, reserved, to_come = [], 0, 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if partial := PARTIAL_FILE.fullmatch(entry.name):
                    size = int(partial[2])
                    if _is_locked(self._locks / partial[1]):
                        reserved, to_come = reserved + size, to_come + max(0, size - status.st_size)
                    else:
                        Path(entry.path).unlink(missing_ok=True)  # its process was killed
                elif SHARD_FILE.fullmatch(entry.name):
                    there.append((status.st_mtime, status.st_size, Path(entry.path)))
        return there, reserved, to_come

    def _full_disk(self, shard: StoredShard) -> str:
        free = os.statvfs(self.folder)
        return (
            f"no room for its {shard.num_bytes / 1e6:,.1f} MB in data.cache_dir {self.folder}, whose disk has "
            f"{free.f_bavail * free.f_frsize / 1e6:,.1f} MB free. Free some, or choose another data.cache_dir"
        )


def _has_size(shard: StoredShard, size: int) -> bool:
    return size == shard.num_bytes if shard.sha256 else size >= shard.num_bytes


def _remove(path: Path) -> bool:
    """Remove a shard that nobody holds; False for one in use."""
    with _tried(path) as free:
        if free:
            path.unlink(missing_ok=True)
        return free


def _is_locked(path: Path) -> bool:
    with _tried(path) as free:
        return not free


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _tried(path: Path) -> Iterator[bool]:
    """Lock a file unless another process does: True with the lock, or where there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)
