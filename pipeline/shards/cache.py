"""Shards of a store on a local disk: a bounded cache for all processes of a machine, and the downloads of one loader.

The file system is the cache's only state: a shard in use has a second hard link in a folder of pins, and kernel file locks guard
downloads, folders of pins and eviction. The kernel drops the locks of a killed process, so nothing needs repair after one.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.shards.index_file import shard_problem
from pipeline.shards.object_store import StoreError, download, retry

# A process that waited for the download of another one, which failed, retries for at least this long. With the full
# `retry_s`, eight ranks that wait for each other would try eight times as long as the user asked for.
MIN_RETRY_S = 10.0
SHARD_FILES = f"*-{24 * '[0-9a-f]'}.tar"  # the folder can hold other files, which the cache never touches
MAX_PREFETCHED = 8  # shards
POLL_S = 0.2
FULL_CACHE_S = 20.0  # of waiting until other processes free a part of a full cache
CACHE_SHARE = 4  # one window, and what is prefetched after it, take at most this part (1 / 4) of the cache each


@dataclass(frozen=True)
class CacheSettings:
    """`folder`: None for one of this user in the temporary folder. `retry_s`: for which a failing store is retried.

    `streams`: parallel downloads. With more of them the next shard arrives later, since they share the bandwidth.
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


class Cancelled(RuntimeError):
    """The wait for shards was cancelled."""


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
        # Guards eviction, pinning, and the creation of folders of pins against each other.
        self._folder_lock = self._locks / ".folder"

    def make(self) -> None:
        """Create the folders. Raises ValueError if that fails, or if their file system has no hard links."""
        try:
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
        with _locked(self._folder_lock):
            return Pins(self._pins)

    def pin(self, shard: StoredShard, pins: Pins) -> bool:
        """Pin a cached shard and mark it as planned. Returns False if it is not in the cache."""
        path, link = self.path(shard), pins.folder / shard.name
        with _locked(self._folder_lock):
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
        download(shard.url, partial, fresh)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if (size := partial.stat().st_size) < shard.num_bytes:
            raise OSError(f"ended after {size:,} of {shard.num_bytes:,} bytes")

    def _make_room(self, shard: StoredShard, partial: Path) -> None:
        """Evict shards until this one fits, and create `partial`. Raises CacheFullError."""
        with _locked(self._folder_lock):
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


class ShardFetcher:
    """Downloads shards of an index, by number, in daemon threads.

    A ThreadPoolExecutor would not do: Python joins its threads at exit, and a process that ends must not wait for a download
    that nobody will read.
    """

    def __init__(self, shards: Sequence[StoredShard], cache: ShardCache) -> None:
        self.shards, self.cache, self.budget = shards, cache, cache.max_bytes // CACHE_SHARE
        self._pins, self._prefetching = cache.new_pins(), list[Future[None]]()
        self._released = threading.Event()

    def ready_batches(self, shards: np.ndarray) -> int:
        """Return the number of leading batches, at least one, whose shards are cached. `shards`: `[n, B]`, by sample."""
        flat, batch_size, num_bytes = shards.reshape(-1), shards.shape[1], 0
        for start in np.sort(np.unique(flat, return_index=True)[1]).tolist():
            shard = self.shards[flat[start]]
            num_bytes += shard.num_bytes
            # The first batch is made in any case, after waiting for its shards.
            if start >= batch_size and (num_bytes > self.budget or not self.cache.pin(shard, self._pins)):
                return start // batch_size
        return len(shards)

    def wait_for(self, shards: Iterable[int], cancelled: Callable[[], bool] = lambda: False) -> Pins:
        """Wait until these shards are in the cache and return the pins that keep them there.

        Raises StoreError, and Cancelled soon after `cancelled` returns True or `release` is called.
        """
        released, pins = self._released, self.cache.new_pins()
        missing = [shard for shard in dict.fromkeys(shards) if not self.cache.pin(self.shards[shard], pins)]
        if missing:
            self._cancel_prefetching()  # what is waited for comes first
        pending = futures = set(self._start(self._fetch_with_patience, missing, pins))
        try:
            while pending:
                done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
                if cancelled() or released.is_set():
                    raise Cancelled
                for future in done:
                    future.result()
        finally:
            for future in futures:
                future.cancel()
        return pins

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download the first of these shards in the background, within the budget, instead of those prefetched before."""
        chosen, num_bytes = list[int](), 0
        for shard in shards:
            if shard not in chosen:
                num_bytes += self.shards[shard].num_bytes
                if len(chosen) == MAX_PREFETCHED or (chosen and num_bytes > self.budget):
                    break
                chosen.append(shard)
        self._cancel_prefetching()
        pins = self.cache.new_pins()
        missing = [shard for shard in chosen if not self.cache.pin(self.shards[shard], pins)]
        self._pins, self._prefetching = pins, self._start(self.cache.fetch, missing, pins)

    def release(self) -> None:
        """Unpin all prefetched shards, forget what is queued, and cancel every `wait_for`."""
        released, self._released = self._released, threading.Event()
        released.set()
        self._drop_prefetched()

    def _cancel_prefetching(self) -> None:
        for future in self._prefetching:
            future.cancel()

    def _drop_prefetched(self) -> None:
        self._cancel_prefetching()
        for path in self._pins.folder.glob("*.tar"):
            path.unlink(missing_ok=True)

    def _fetch_with_patience(self, shard: StoredShard, pins: Pins) -> None:
        """Fetch a shard; in a full cache, prefetched shards make room, and other processes have some time to free theirs."""
        full_until = 0.0
        while True:
            try:
                self.cache.fetch(shard, pins)
                return
            except CacheFullError:
                full_until = full_until or time.monotonic() + FULL_CACHE_S
                if time.monotonic() > full_until:
                    raise
                self._drop_prefetched()
                time.sleep(POLL_S)

    def _start(self, fetch: Callable[[StoredShard, Pins], None], shards: list[int], pins: Pins) -> list[Future[None]]:
        futures = [Future[None]() for _ in shards]
        jobs = iter(list(zip(shards, futures, strict=True)))  # of all threads: each takes the next job

        def work() -> None:
            for shard, future in jobs:
                if future.set_running_or_notify_cancel():
                    try:
                        fetch(self.shards[shard], pins)
                        future.set_result(None)
                    except Exception as error:  # noqa: BLE001 - raised again where the shard is needed
                        future.set_exception(error.with_traceback(None))

        for _ in range(min(len(shards), self.cache.streams)):
            threading.Thread(target=work, daemon=True).start()
        return futures


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


def _remove_if_unlocked(folder: Path) -> None:
    """Remove a folder of pins whose process was killed."""
    with suppress(FileNotFoundError, BlockingIOError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
