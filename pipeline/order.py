"""Which samples are in which batch: a pure function of (shard sizes, seed, epoch), evaluated lazily.

An epoch is a permutation: shards in random order, and inside each shard its rows in random order. It is cut into global batches,
of which each rank takes its slice. Only the shards that a slice touches are permuted, so memory does not grow with the data set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.quarantine import Quarantine
from pipeline.shards.index import ShardIndex

# The last word of a Philox counter names the stream: order, augmentation draws and replacements never share numbers.
ORDER_STREAM, DRAW_STREAM, REPLACEMENT_STREAM = 1, 2, 3


def random_words(seed: int, epoch: int, counter: tuple[int, int], stream: int, count: int) -> np.ndarray:
    """Return `[count] uint64` of Philox4x64 (Salmon et al. 2011), keyed by (seed, epoch).

    They begin at block `counter[0]` of lane `counter[1]`; one block is four words. Only the raw words are used: numpy keeps them
    stable across releases, unlike its samplers.
    """
    return np.random.Philox(key=[seed, epoch], counter=[*counter, 0, stream]).random_raw(count)


def permutation(seed: int, epoch: int, lane: int, size: int) -> np.ndarray:
    """Return `[size] int64`, a uniformly random order of `range(size)`."""
    return np.argsort(random_words(seed, epoch, (0, lane), ORDER_STREAM, size), kind="stable")


@dataclass(frozen=True)
class Plan:
    """Which row is at which position of which epoch.

    `sizes`: `[num_shards] int64`, the rows of each shard. `shuffle=False` keeps the stored order, for evaluation.
    """

    sizes: np.ndarray
    seed: int
    shuffle: bool = True

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return `[stop - start] int64`, the index rows at the positions `start..stop` of `epoch`."""
        if not 0 <= start <= stop <= (total := int(self.sizes.sum())):
            raise ValueError(f"positions {start}..{stop} lie outside an epoch of {total} samples")
        if not self.shuffle:
            return np.arange(start, stop)
        # Lane 0 orders the shards, lane s + 1 the rows of shard s.
        shard_order = permutation(self.seed, epoch, 0, len(self.sizes))
        ends = np.cumsum(self.sizes[shard_order])
        firsts = np.cumsum(self.sizes) - self.sizes
        parts = [np.empty(0, np.int64)]
        for slot in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
            shard, begin = shard_order[slot], ends[slot] - self.sizes[shard_order[slot]]
            if begin >= stop:
                break
            order = permutation(self.seed, epoch, int(shard) + 1, int(self.sizes[shard]))
            parts.append(firsts[shard] + order[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)


class BatchStart(NamedTuple):
    """Where a global batch begins."""

    epoch: int
    position: int


@dataclass
class BatchSequence:
    """Global batch k of an epoch holds the positions `k * G .. (k + 1) * G` with `G = batch_size * world_size`.

    Every rank takes the same number of steps. With `drop_last` the `N mod G` positions at the end of an epoch are left out
    (different samples in each epoch), without it the last batch is shorter. Raises ValueError for a data set smaller than one
    global batch, unless the last batch can be shorter.
    """

    index: ShardIndex
    plan: Plan
    quarantine: Quarantine
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.steps(0) == 0:
            raise ValueError(
                f"{self.index.folder}: {len(self.index)} samples are fewer than one global batch of {self.global_batch} "
                f"(batch_size {self.batch_size} x {self.world_size} ranks). Lower data.batch_size"
            )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def steps(self, position: int) -> int:
        """Return the number of batches of an epoch from `position` on."""
        rest = len(self.index) - position
        return rest // self.global_batch if self.drop_last else -(-rest // self.global_batch)

    def iter_batch_starts(self, start: BatchStart) -> Iterator[BatchStart]:
        """Yield the starts of all global batches from `start` on, without end."""
        epoch, position = start
        while True:
            yield from (BatchStart(epoch, position + k * self.global_batch) for k in range(self.steps(position)))
            epoch, position = epoch + 1, 0

    def rank_start(self, start: BatchStart) -> int:
        """Return the position of this rank's first sample of the global batch at `start`."""
        return start.position + self.rank * self.batch_size

    def rank_rows(self, starts: list[BatchStart]) -> np.ndarray:
        """Return `[len(starts), B] int64`, this rank's index rows; past the end of an epoch its last row is repeated."""
        firsts, epochs = np.array([self.rank_start(start) for start in starts]), np.array(starts)[:, 0]
        positions = np.minimum(firsts[:, None] + np.arange(self.batch_size), len(self.index) - 1)
        rows = np.empty(positions.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = positions[epochs == epoch]
            low, high = int(in_epoch.min()), int(in_epoch.max()) + 1
            rows[epochs == epoch] = self.rows_at(epoch, low, high)[in_epoch - low]  # one permutation for all of them
        return rows

    def rows_at(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return `[stop - start] int64`, the index rows at these positions, with a replacement for each bad sample.

        The replacement is the first good row of a random sequence that belongs to the position, so it does not depend on which
        bad samples were known when: every run over the same shards sees the same samples.
        """
        rows, bad = self.plan.rows(epoch, start, stop), self.quarantine.reasons
        for i in np.flatnonzero(np.isin(rows, list(bad))).tolist() if bad else ():
            block = 0
            while int(rows[i]) in bad:
                words = random_words(self.plan.seed, epoch, (block, start + i), REPLACEMENT_STREAM, 4)
                candidates = (int(word % np.uint64(len(self.index))) for word in words)
                rows[i] = next((row for row in candidates if row not in bad), rows[i])
                block += 1
        return rows
