"""A bounded cache of complete shards on a local disk, shared by all processes of a machine.

The file system is its only state: a shard in use has a second hard link in a folder of pins, and kernel file locks guard
downloads, folders of pins and eviction. The kernel drops the locks of a killed process, so nothing needs repair after one.
"""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.defaults import CACHE_SIZE_GB, STORE_RETRY_S, STORE_STREAMS
from pipeline.files import file_checksum, private_folder
from pipeline.lock import locked
from pipeline.shards.index_file import shard_problem
from pipeline.shards.storage import StoreError, download, retry

# A process that waited for the download of another one, which failed, retries for at least this long. With the full
# `retry_s`, eight ranks that wait for each other would try eight times as long as the user asked for.
MIN_RETRY_S = 10.0
MAX_TAIL_BYTES = 1 << 26
SHARD_FILES = f"*-{24 * '[0-9a-f]'}.tar"  # the folder can hold other files, which the cache never touches


@dataclass(frozen=True)
class CacheSettings:
    """`folder`: None for one of this user in the temporary folder. `retry_s`: for which a failing store is retried.

    `streams`: parallel downloads. With more of them the next shard arrives later, since they share the bandwidth.
    """

    folder: Path | None = None
    max_bytes: int = int(CACHE_SIZE_GB * 1e9)
    retry_s: float = STORE_RETRY_S
    streams: int = STORE_STREAMS


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
        self._is_private, self._checked = settings.folder is None, set[tuple[int, int]]()
        self.folder = settings.folder or Path(tempfile.gettempdir()) / f"multicrop-hjepa-{os.getuid()}"
        self.max_bytes, self.retry_s, self.streams = settings.max_bytes, settings.retry_s, settings.streams
        self._locks, self._pins = self.folder / "locks", self.folder / "pins"
        # Guards eviction, pinning, and the creation of folders of pins against each other.
        self._folder_lock = self._locks / ".folder"

    def make(self) -> None:
        """Create the folders. Raises ValueError if that fails, or if their file system has no hard links."""
        try:
            if self._is_private:
                private_folder(self.folder)
            self._locks.mkdir(parents=True, exist_ok=True)
            self._pins.mkdir(exist_ok=True)
            pins = self.new_pins()
            os.link(self._folder_lock, pins.folder / "trial")
        except OSError as error:
            reason = f"{self.folder} cannot be made, or has no hard links ({error.strerror})"
            raise ValueError(f"data.cache_dir: {reason}; choose another") from None

    def path(self, shard: StoredShard) -> Path:
        return self.folder / shard.name

    def new_pins(self) -> Pins:
        with locked(self._folder_lock):
            return Pins(self._pins)

    def pin(self, shard: StoredShard, pins: Pins) -> bool:
        """Pin a cached shard and mark it as planned. Returns False if it is not in the cache."""
        path, link = self.path(shard), pins.folder / shard.name
        with locked(self._folder_lock):
            try:
                if not link.exists():
                    size = path.stat().st_size
                    if size < shard.num_bytes or (shard.sha256 and size > shard.num_bytes):
                        return False
                    os.link(path, link)
                    if not self._is_trusted(shard, link):
                        link.unlink()
                        return False
                os.utime(link)
            except FileNotFoundError:
                return False
        return True

    def _is_trusted(self, shard: StoredShard, link: Path) -> bool:
        """Return True for a shard that this user downloaded, and for another user's with the sha256 of the manifest."""
        status = link.stat()
        key = status.st_ino, status.st_mtime_ns
        if status.st_uid not in (0, os.geteuid()) and key not in self._checked:
            if not shard.sha256 or file_checksum(link) != shard.sha256:
                return False
            self._checked.add(key)
        return True

    def fetch(self, shard: StoredShard, pins: Pins) -> None:
        """Pin a shard, after downloading it if necessary. Processes that want the same shard wait for one download.

        Raises StoreError, also if too much of the cache is pinned (CacheFullError).
        """
        started = time.monotonic()
        with locked(self._locks / shard.name):
            if self.pin(shard, pins):
                return
            retry_s = max(min(MIN_RETRY_S, self.retry_s), self.retry_s - (time.monotonic() - started))
            # Among the pins, so that it goes with them if this process is killed. Its name reserves its bytes.
            partial = pins.folder / f"{shard.name}.{shard.num_bytes}.partial"
            try:
                for _ in range(2):  # damage in transit does not happen twice
                    retry(lambda fresh: self._download(shard, partial, fresh), shard.url, retry_s)
                    if (problem := _content_problem(shard, partial)) is None:
                        break
                else:
                    raise StoreError(f"{shard.url}: {problem}. Upload it again, with its index and manifest")
                # It has two links from the start, so that no process evicts it in between.
                self.path(shard).unlink(missing_ok=True)  # a damaged copy
                os.link(partial, self.path(shard))
                partial.rename(pins.folder / shard.name)
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, shard: StoredShard, partial: Path, fresh: bool) -> None:
        self._make_room(shard, partial)
        # Without a manifest the length is not known: labels and padding can follow the last image.
        download(shard.url, partial, shard.num_bytes + (0 if shard.sha256 else MAX_TAIL_BYTES), fresh)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if (size := partial.stat().st_size) < shard.num_bytes:
            raise OSError(f"ended after {size:,} of {shard.num_bytes:,} bytes")

    def _make_room(self, shard: StoredShard, partial: Path) -> None:
        """Evict shards until this one fits, and create `partial`. Raises CacheFullError."""
        with locked(self._folder_lock):
            partial.unlink(missing_ok=True)
            for folder in self._pins.iterdir():
                _remove_if_unlocked(folder)
            disk, used, evictable = os.statvfs(self.folder), 0, []
            free = disk.f_bavail * disk.f_frsize
            for path in (*self._pins.glob("*/*.partial"), *self.folder.glob(SHARD_FILES)):
                try:
                    status = path.stat()
                except FileNotFoundError:  # the download has just ended, or a user clears the cache
                    continue
                size = int(path.name.split(".")[-2]) if path.suffix == ".partial" else status.st_size
                used, free = used + size, free - max(0, size - status.st_size)
                if path.parent == self.folder and status.st_nlink == 1:  # evicting a pinned shard would free nothing
                    evictable.append((status.st_mtime, size, path))
            for _, size, path in sorted(evictable):
                if used + shard.num_bytes <= self.max_bytes and shard.num_bytes <= free:
                    break
                path.unlink(missing_ok=True)
                used, free = used - size, free + size
            if used + shard.num_bytes > self.max_bytes or shard.num_bytes > free:
                raise CacheFullError(
                    f"{shard.url}: no room for its {shard.num_bytes / 1e6:,.1f} MB: shards in use take {used / 1e6:,.1f} MB "
                    f"of data.cache_size_gb {self.max_bytes / 1e9:g}, and the disk of data.cache_dir {self.folder} has "
                    f"{free / 1e6:,.1f} MB free. Raise data.cache_size_gb, free disk space, or choose another data.cache_dir"
                )
            partial.touch()


def _content_problem(shard: StoredShard, path: Path) -> str | None:
    """Compare a complete download with the manifest or, without one, with the index."""
    if not shard.sha256:
        return shard_problem(path, shard.ends)
    if file_checksum(path) == shard.sha256:
        return None
    return "its sha256 is not that of manifest.json: changed in the store, or damaged"


def _remove_if_unlocked(folder: Path) -> None:
    """Remove a folder of pins whose process was killed."""
    with suppress(FileNotFoundError, BlockingIOError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
