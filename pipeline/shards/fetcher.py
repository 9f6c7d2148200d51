"""The shards of one loader on their way from a store: those it waits for first, then those it needs next."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import numpy as np

from pipeline.shards.cache import CacheFullError, Pins, ShardCache, StoredShard

MAX_PREFETCHED = 8  # shards
POLL_S = 0.2
FULL_CACHE_S = 20.0  # of waiting until other processes free a part of a full cache
CACHE_SHARE = 4  # one window, and what is prefetched after it, take at most this part (1 / 4) of the cache each


class Cancelled(RuntimeError):
    """The wait for shards was cancelled."""


class ShardFetcher:
    """Downloads shards of an index, by number, in `cache.streams` threads that end when nothing is queued.

    A ThreadPoolExecutor would not do: Python joins its threads at exit, and a process that ends must not wait for a download
    that nobody will read.
    """

    def __init__(self, shards: Sequence[StoredShard], cache: ShardCache) -> None:
        self.shards, self.cache, self.budget = shards, cache, cache.max_bytes // CACHE_SHARE
        self._pins = cache.new_pins()
        self._lock = threading.Lock()  # guards all that follows
        self._futures: dict[int, Future[None]] = {}
        self._urgent: deque[int] = deque()
        self._later: deque[int] = deque()
        self._num_threads = self._num_releases = 0

    def ready_batches(self, shards: np.ndarray) -> int:
        """The number of leading batches, at least one, whose shards are in the cache. `shards`: `[n, B]`, by sample."""
        flat, batch_size = shards.reshape(-1), shards.shape[1]
        starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1]).tolist()
        seen: set[int] = set()
        num_bytes = 0
        for start in starts:
            shard = int(flat[start])
            if shard not in seen:
                seen.add(shard)
                num_bytes += self.shards[shard].num_bytes
                # The first batch is made in any case, after waiting for its shards.
                if start >= batch_size and (num_bytes > self.budget or not self._is_cached(shard)):
                    return start // batch_size
        return len(shards)

    def wait_for(self, shards: Iterable[int], cancelled: Callable[[], bool] = lambda: False) -> Pins:
        """Wait until these shards are in the cache and return the pins that keep them there.

        Raises StoreError, and Cancelled soon after `cancelled` returns True or `release` is called.
        """
        pins, missing = self.cache.new_pins(), list(dict.fromkeys(shards))
        futures: dict[int, Future[None]] = {}
        releases, full_until = self._num_releases, 0.0
        while missing := [shard for shard in missing if not self.cache.pin(self.shards[shard], pins)]:
            futures |= self._submit([shard for shard in missing if shard not in futures], self._urgent)
            wait([futures[shard] for shard in missing], POLL_S, FIRST_COMPLETED)
            if cancelled() or self._num_releases > releases:
                raise Cancelled
            # A future is inspected before it is replaced, so that all who wait for it learn of its failure.
            for shard in [shard for shard in missing if futures[shard].done()]:
                error = futures.pop(shard).exception()
                if isinstance(error, CacheFullError):
                    full_until = full_until or time.monotonic() + FULL_CACHE_S
                    if time.monotonic() < full_until:
                        self._drop_prefetched(set())
                        time.sleep(POLL_S)
                        continue
                if error is not None:
                    raise error
        return pins

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download the first of these shards in the background, within the budget, instead of those prefetched before."""
        chosen: dict[int, str] = {}
        num_bytes = 0
        for shard in shards:
            if shard not in chosen:
                num_bytes += self.shards[shard].num_bytes
                if len(chosen) == MAX_PREFETCHED or (chosen and num_bytes > self.budget):
                    break
                chosen[shard] = self.shards[shard].name
        self._drop_prefetched(set(chosen.values()))
        self._submit([shard for shard in chosen if not self._is_cached(shard)], self._later)

    def release(self) -> None:
        """Unpin all prefetched shards, forget what is queued, and cancel every `wait_for`."""
        with self._lock:
            self._num_releases += 1
            self._cancel(self._urgent)
        self._drop_prefetched(set())

    def _is_cached(self, shard: int) -> bool:
        return self.cache.pin(self.shards[shard], self._pins)

    def _drop_prefetched(self, kept_names: set[str]) -> None:
        with self._lock:
            self._cancel(self._later)
        for path in self._pins.folder.iterdir():
            if path.name not in kept_names:
                path.unlink(missing_ok=True)

    def _cancel(self, queue: deque[int]) -> None:
        for shard in queue:
            self._futures[shard].cancel()
        queue.clear()

    def _submit(self, shards: list[int], queue: deque[int]) -> dict[int, Future[None]]:
        """Queue what is not yet on its way; urgent shards go before those that are queued already."""
        with self._lock:
            fresh = []
            for shard in shards:
                if shard not in self._futures or self._futures[shard].done():
                    self._futures[shard] = Future()
                    fresh.append(shard)
                elif queue is self._urgent and shard in self._later:
                    self._later.remove(shard)
                    fresh.append(shard)
            queue.extendleft(reversed(fresh))
            for _ in range(min(len(fresh), self.cache.streams - self._num_threads)):
                self._num_threads += 1
                threading.Thread(target=self._work, daemon=True).start()
            return {shard: self._futures[shard] for shard in shards}

    def _work(self) -> None:
        while True:
            with self._lock:
                if not (queue := self._urgent or self._later):
                    self._num_threads -= 1
                    return
                shard = queue.popleft()
                future = self._futures[shard]
                future.set_running_or_notify_cancel()
            try:
                self.cache.fetch(self.shards[shard], self._pins)
            except Exception as error:  # noqa: BLE001 - raised again where the shard is needed
                future.set_exception(error.with_traceback(None))
            else:
                future.set_result(None)
