"""The shards of one loader: those of a folder are watched; those of a store are on their way, in the order of their use."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.shards.cache import CacheFullError, Pins, ShardCache, StoredShard
from pipeline.shards.storage import StoreError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_PREFETCHED = 8  # shards
POLL_S = 0.2
FULL_CACHE_S = 20.0  # of waiting until other processes free a part of a full cache
CACHE_SHARE = 4  # one window, and what is prefetched after it, take at most this part (1 / 4) of the cache each


class Cancelled(RuntimeError):
    """The wait for shards was cancelled."""


def patiently(work: Callable[[], Result], retry_s: float, cancelled: Callable[[], bool] = lambda: False) -> Result:
    """Return `work()`, tried again for `retry_s` seconds while it raises OSError. Raises StoreError, or Cancelled as asked."""
    started, warned = time.monotonic(), False
    while True:
        try:
            return work()
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if time.monotonic() - started >= retry_s:
            raise StoreError(f"{problem}, tried for {retry_s:g} s. Restore the shards as they were")
        if not warned:
            log.warning(f"{problem}; waiting up to {retry_s:g} s for it")
        warned = True
        if cancelled():
            raise Cancelled
        time.sleep(POLL_S)


class FolderWatch:
    """The tars of a folder, at `paths` by number, which must stay as they are while a run reads them.

    Bytes from a tar that is away, unreadable or replaced say nothing about its images.
    """

    def __init__(self, paths: Sequence[Path], retry_s: float) -> None:
        self._paths, self.retry_s, self._stamps = paths, retry_s, [_stamp(os.stat(path)) for path in paths]
        self._released = threading.Event()

    def ready_batches(self, shards: np.ndarray) -> int:
        """Return the number of leading batches, at least one, whose shards can be read. `shards`: `[n, B]`, by sample."""
        flat, batch_size = shards.reshape(-1), shards.shape[1]
        for start in np.sort(np.unique(flat, return_index=True)[1]).tolist():
            try:
                self.check([flat[start]])
            except OSError:
                return max(1, start // batch_size)
        return len(shards)

    def wait_for(self, shards: Iterable[int], cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait until these shards can be read. Raises StoreError after `retry_s`, and Cancelled as `ShardFetcher.wait_for`."""
        released = self._released
        patiently(lambda: self.check(shards), self.retry_s, lambda: released.is_set() or cancelled())

    def check(self, shards: Iterable[int]) -> None:
        """Raise OSError for a tar that cannot be read, or that was changed."""
        for shard in shards:
            with self._paths[shard].open("rb", buffering=0) as file:
                file.read(1)
                if _stamp(os.fstat(file.fileno())) != self._stamps[shard]:
                    raise StoreError(f"{self._paths[shard]}: changed since the run began")

    def prefetch(self, shards: Iterable[int]) -> None:
        """Do nothing: the shards are here."""

    def release(self) -> None:
        """Cancel every `wait_for`."""
        released, self._released = self._released, threading.Event()
        released.set()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino


class ShardFetcher:
    """Downloads shards of an index, by number, in daemon threads.

    A ThreadPoolExecutor would not do: Python joins its threads at exit, and a process that ends must not wait for a download
    that nobody will read.
    """

    def __init__(self, shards: Sequence[StoredShard], cache: ShardCache) -> None:
        self.shards, self.cache, self.budget = shards, cache, cache.max_bytes // CACHE_SHARE
        self.retry_s = cache.retry_s
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

    def check(self, shards: Iterable[int]) -> None:
        """Do nothing: nobody else changes the shards that are pinned."""

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
