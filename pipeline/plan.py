"""The order of samples: a pure function of (shard sizes, seed, epoch), evaluated lazily at any slice of positions.

An epoch is a permutation: shards in a random order, and inside each shard its rows in a random order. Only the shards that a
slice touches are permuted, so memory does not grow with the data set.
"""

from dataclasses import dataclass

import numpy as np

# The last word of a Philox counter names the stream: order, augmentation draws and stand-ins never share numbers.
ORDER_STREAM, DRAW_STREAM, STAND_IN_STREAM = 1, 2, 3


def random_words(seed: int, epoch: int, counter: tuple[int, int], stream: int, count: int) -> np.ndarray:
    """`[count] uint64` of Philox4x64 (Salmon et al. 2011), keyed by (seed, epoch), from block `counter[0]` of lane `counter[1]`.

    One block is four words. Only the raw words are used: numpy keeps them stable across releases, unlike its samplers.
    """
    bits = np.random.Philox(key=[seed, epoch], counter=[counter[0], counter[1], 0, stream])
    return bits.random_raw(count)


def permutation(seed: int, epoch: int, lane: int, size: int) -> np.ndarray:
    """`[size] int64`: a uniformly random order of `range(size)`."""
    return np.argsort(random_words(seed, epoch, (0, lane), ORDER_STREAM, size), kind="stable")


@dataclass(frozen=True)
class Plan:
    """Which row stands at which position of which epoch.

    `sizes`: `[num_shards] int64`, the rows per shard. `shuffle=False` keeps the stored order (evaluation).
    """

    sizes: np.ndarray
    seed: int
    shuffle: bool = True

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    def shards(self, epoch: int, start: int) -> np.ndarray:
        """`[n] int64`: the shards that hold the positions of `epoch` from `start` on, in the order of the epoch."""
        order = permutation(self.seed, epoch, 0, len(self.sizes)) if self.shuffle else np.arange(len(self.sizes))
        used = order[self.sizes[order] > 0]
        return used[np.cumsum(self.sizes[used]) > start]

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """`[stop - start] int64`: the index rows at positions `start..stop` of `epoch`."""
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"positions {start}..{stop} lie outside an epoch of {self.num_samples} samples")
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
