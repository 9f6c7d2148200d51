"""A cache of complete shards on a local disk, shared by all processes of a machine.

The file system is its only state: a shard in use has a second hard link in a folder of pins, and kernel file locks guard
downloads, folders of pins and eviction. The kernel drops the locks of a killed process, so nothing needs repair after one.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.shards.index_file import shard_problem
from pipeline.shards.object_store import StoreError, download, retry

# A process that waited for the download of another one, which failed, retries for at least this long. With the full
# `retry_s`, eight ranks that wait for each other would try eight times as long as the user asked for.
MIN_RETRY_S = 10.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Names of cached shards and of downloads in progress. The folder can hold other files, which the cache leaves alone.
SHARD_FILE = re.compile(r".+-[0-9a-f]{24}\.tar")
PARTIAL_FILE = re.compile(r"\.(.+-[0-9a-f]{24}\.tar)\.(\d+)\.partial")


@dataclass(frozen=True)
class CacheSettings:
    """Where the cache lies, how much it holds, and how it downloads.

    `folder`: None for a folder of this user in the temporary folder. `retry_s`: how long a failing store is retried. `streams`:
    parallel downloads per process; with more of them the next shard arrives later, since they share the bandwidth.
    """

    folder: Path | None = None
    max_bytes: int = 100 * 10**9
    retry_s: float = 120.0
    streams: int = 2


@dataclass(frozen=True)
class StoredShard:
    """A shard in a store.

    `name`: its file in the cache, which differs for other content. `num_bytes`: its size; without a manifest, the size that the
    index needs at least. `sha256`: "" without a manifest. `ends`: `[2]` of SAMPLE_DTYPE, its first and last sample.
    """

    url: str
    name: str
    num_bytes: int
    sha256: str
    ends: np.ndarray


class CacheFullError(StoreError):
    """The cache, or its disk, has too little room even after everything unpinned is evicted."""


class Pins:
    """A folder of hard links to shards. They stay on the disk until this object is freed, whoever evicts their names."""

    def __init__(self, parent: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=parent))
        # Locked as long as the process lives: an unlocked folder was left by a killed process.
        descriptor = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        cleanup = ExitStack()
        cleanup.callback(os.close, descriptor)
        cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        weakref.finalize(self, cleanup.close)


class ShardCache:
    """Complete shards, at most `max_bytes` of them; eviction starts with the one that was planned least recently."""

    def __init__(self, settings: CacheSettings) -> None:
        self.folder = settings.folder or Path(tempfile.gettempdir()) / f"multicrop-hjepa-{os.getuid()}"
        self.max_bytes, self.retry_s, self.streams = settings.max_bytes, settings.retry_s, settings.streams
        self._locks, self._pins = self.folder / "locks", self.folder / "pins"

    def make(self) -> None:
        """Create the folders. Raises ValueError if that fails, or if their file system has no hard links."""
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            self._pins.mkdir(exist_ok=True)
            pins = self.new_pins()
            os.link(self._locks / ".folder", pins.folder / "trial")
        except OSError as error:
            reason = f"{self.folder} cannot be made, or has no hard links ({error.strerror})"
            raise ValueError(f"data.cache_dir: {reason}; choose another") from None

    def path(self, shard: StoredShard) -> Path:
        return self.folder / shard.name

    def new_pins(self) -> Pins:
        with self._folder_lock():
            return Pins(self._pins)

    def pin(self, shard: StoredShard, pins: Pins) -> bool:
        """Pin a cached shard and mark it as planned. Returns False if it is not in the cache."""
        path, link = self.path(shard), pins.folder / shard.name
        with self._folder_lock():
            try:
                if not link.exists():
                    size = path.stat().st_size
                    if size != shard.num_bytes if shard.sha256 else size < shard.num_bytes:
                        return False
                    os.link(path, link)
                os.utime(link)
            except FileNotFoundError:
                return False
        return True

    def fetch(self, shard: StoredShard, pins: Pins) -> None:
        """Pin a shard, after downloading it if necessary. Processes that want the same shard wait for one download.

        Raises StoreError, also if too much of the cache is pinned (CacheFullError).
        """
        started = time.monotonic()
        with _locked(self._locks / shard.name):
            if self.pin(shard, pins):
                return
            retry_s = max(min(MIN_RETRY_S, self.retry_s), self.retry_s - (time.monotonic() - started))
            partial = self.folder / f".{shard.name}.{shard.num_bytes}.partial"
            try:
                for is_last in (False, True):  # damage in transit does not happen twice
                    retry(lambda fresh: self._download(shard, partial, fresh), shard.url, retry_s)
                    problem = _content_problem(shard, partial)
                    if problem is None:
                        break
                    if is_last:
                        raise StoreError(f"{shard.url}: {problem}. Upload it again, with its index and manifest")
                # Pinned before it appears under its name, so that no process can evict it in between.
                os.link(partial, pins.folder / shard.name)
                partial.rename(self.path(shard))
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, shard: StoredShard, partial: Path, fresh: bool) -> None:
        self._make_room(shard, partial)
        try:
            download(shard.url, partial, fresh)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in DISK_FULL:
                raise self._full(shard) from None
            raise
        if (size := partial.stat().st_size) < shard.num_bytes:
            raise OSError(f"ended after {size:,} of {shard.num_bytes:,} bytes")

    def _make_room(self, shard: StoredShard, partial: Path) -> None:
        """Evict shards until this one fits, and reserve its bytes: the name of the partial file holds its final size."""
        with self._folder_lock():
            partial.unlink(missing_ok=True)
            for folder in self._pins.iterdir():
                if not _is_locked(folder):  # its process was killed
                    shutil.rmtree(folder, ignore_errors=True)
            evictable, used, free = self._contents()
            for _, size, path in sorted(evictable):
                if used + shard.num_bytes <= self.max_bytes and shard.num_bytes <= free:
                    break
                path.unlink(missing_ok=True)
                used, free = used - size, free + size
            if used + shard.num_bytes > self.max_bytes or shard.num_bytes > free:
                raise self._full(shard)
            partial.touch()

    def _contents(self) -> tuple[list[tuple[float, int, Path]], int, int]:
        """(time of planning, size, path) of each unpinned shard; bytes of all shards and downloads; bytes free on the disk."""
        evictable, used = [], 0
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        for path in self.folder.iterdir():
            partial = PARTIAL_FILE.fullmatch(path.name)
            if partial and not _is_locked(self._locks / partial[1]):  # its process was killed
                path.unlink(missing_ok=True)
            elif partial or SHARD_FILE.fullmatch(path.name):
                try:
                    status = path.stat()
                except FileNotFoundError:  # the download has just ended
                    continue
                size = int(partial[2]) if partial else status.st_size
                used, free = used + size, free - max(0, size - status.st_size)
                if not partial and status.st_nlink == 1:  # evicting a pinned shard would free nothing
                    evictable.append((status.st_mtime, size, path))
        return evictable, used, free

    def _full(self, shard: StoredShard) -> CacheFullError:
        _, used, free = self._contents()
        return CacheFullError(
            f"{shard.url}: no room for its {shard.num_bytes / 1e6:,.1f} MB: shards in use take {used / 1e6:,.1f} MB of "
            f"data.cache_size_gb {self.max_bytes / 1e9:g}, and the disk of data.cache_dir {self.folder} has "
            f"{free / 1e6:,.1f} MB free. Raise data.cache_size_gb, free disk space, or choose another data.cache_dir"
        )

    def _folder_lock(self) -> AbstractContextManager[None]:
        """Guards eviction, pinning, and the creation of folders of pins against each other."""
        return _locked(self._locks / ".folder")


def _content_problem(shard: StoredShard, path: Path) -> str | None:
    """Compare a complete download with the manifest or, without one, with the index."""
    if not shard.sha256:
        return shard_problem(path, shard.ends)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
            return None
    return "its sha256 is not that of manifest.json: changed in the store, or damaged"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
