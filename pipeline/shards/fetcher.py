"""The shards of one loader on their way from a store: those it needs now first, and in the background those it needs next."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pipeline.shards.cache import Lease, NoRoom, ShardCache, StoredShard

AHEAD = 8  # shards
POLL_S = 0.2
SHARE = 4  # a window may take this part of the cache, and so may what is fetched ahead of it


class Cancelled(RuntimeError):
    """The wait for shards was ended on request."""


class ShardFetcher:
    """All shards of an index by their number. Its threads end when nothing is wanted, so that nobody has to stop it."""

    def __init__(self, shards: Sequence[StoredShard], cache: ShardCache) -> None:
        self.shards, self.cache, self.budget = shards, cache, cache.max_bytes // SHARE
        self._changed = threading.Condition()  # guards all that follows
        self._leases: dict[int, Lease] = {}
        self._wanted: list[int] = []
        self._needed: Counter[int] = Counter()  # by those that wait in `need`
        self._running: set[int] = set()
        self._failed: dict[int, Exception] = {}
        self._num_threads = self._num_releases = 0

    def ready_batches(self, shards: np.ndarray) -> int:
        """How many batches can be made of what is here, at least one. `shards`: `[n, B]`, of each sample."""
        flat, width = shards.reshape(-1), shards.shape[1]
        starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1]).tolist()
        seen: set[int] = set()
        num_bytes = 0
        for start in starts:
            shard = int(flat[start])
            if shard not in seen:
                seen.add(shard)
                num_bytes += self.shards[shard].num_bytes
                if start >= width and (num_bytes > self.budget or not self._is_here(shard)):
                    return start // width
        return len(shards)

    def need(self, shards: Iterable[int], cancelled: Callable[[], bool] = lambda: False) -> list[Lease]:
        """Wait for these shards, which stay in the cache while the leases live.

        `cancelled`: asked while it waits; true ends that with a Cancelled, as `release` does. Raises StoreError.
        """
        shards = list(dict.fromkeys(shards))
        with self._changed:
            missing = [shard for shard in shards if not self._is_here(shard)]
            for shard in missing:
                if not self._needed[shard]:  # else its failure is for those that wait for it, and for this one too
                    self._failed.pop(shard, None)
            self._needed.update(shards)
            try:
                self._want(missing + self._wanted)
                before = self._num_releases
                while not self._changed.wait_for(
                    lambda: all(s in self._leases or s in self._failed for s in missing), POLL_S
                ):
                    if cancelled() or self._num_releases > before:
                        raise Cancelled
            finally:
                self._needed -= Counter(shards)
            found = {shard: self._leases[shard] for shard in shards if shard in self._leases}
            refused = [shard for shard in shards if shard not in found]
            for shard in refused:
                error = self._failed.get(shard)
                if error is not None and not isinstance(error, NoRoom):
                    raise error
            if refused:  # what was fetched for later takes the room
                self._wanted = [shard for shard in self._wanted if shard in self._needed]
                self._leases = {shard: lease for shard, lease in self._leases.items() if shard in self._needed}
        return [*found.values(), *(self.cache.fetch(self.shards[shard]) for shard in refused)]

    def ahead(self, shards: Iterable[int]) -> None:
        """Fetch the first of these shards, in their order, as far as the room allows; let go of all others."""
        chosen: list[int] = []
        num_bytes = 0
        for shard in shards:
            if shard in chosen:
                continue
            num_bytes += self.shards[shard].num_bytes
            if len(chosen) == AHEAD or (chosen and num_bytes > self.budget):
                break
            chosen.append(shard)
        with self._changed:
            kept = {*chosen, *self._needed}
            self._leases = {shard: lease for shard, lease in self._leases.items() if shard in kept}
            self._want([*self._needed, *chosen])

    def release(self) -> None:
        """Let go of all shards and end the waits for others."""
        with self._changed:
            self._num_releases += 1
            self._wanted, self._leases = [], {}

    def _is_here(self, shard: int) -> bool:
        with self._changed:
            if shard not in self._leases and (lease := self.cache.hold(self.shards[shard])) is not None:
                self._leases[shard] = lease
            return shard in self._leases

    def _want(self, shards: Iterable[int]) -> None:
        self._wanted = [
            shard for shard in dict.fromkeys(shards) if shard not in self._running and not self._is_here(shard)
        ]
        for _ in range(min(len(self._wanted), self.cache.streams - self._num_threads)):
            self._num_threads += 1
            # A daemon: a process that ends does not wait for shards that nobody will read.
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (shard := self._take()) is not None:
            lease: Lease | None = None
            failure: Exception | None = None
            try:
                lease = self.cache.fetch(self.shards[shard], patient=False)
            except Exception as error:  # noqa: BLE001 - raised again where the shard is needed
                failure = error.with_traceback(None)
            self._finish(shard, lease, failure)

    def _take(self) -> int | None:
        with self._changed:
            if not self._wanted:
                self._num_threads -= 1
                return None
            shard = self._wanted.pop(0)
            self._running.add(shard)
            return shard

    def _finish(self, shard: int, lease: Lease | None, failure: Exception | None) -> None:
        with self._changed:
            self._running.discard(shard)
            if lease is not None:
                self._leases[shard] = lease
            if failure is not None:
                self._failed[shard] = failure
            if isinstance(failure, NoRoom):
                self._failed |= dict.fromkeys(self._wanted, failure)
                self._wanted = []
            self._changed.notify_all()
