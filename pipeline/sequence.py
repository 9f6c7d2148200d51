"""The sequence of batches: the plan cut into global batches, of which each rank takes its slice."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.plan import Plan
from pipeline.quarantine import Quarantine
from pipeline.shards.index import ShardIndex

Place = tuple[int, int]  # epoch, and the position in it at which a global batch begins


@dataclass
class BatchSequence:
    """Global batch k of an epoch holds the positions `k * G .. (k + 1) * G` with `G = batch_size * world_size`.

    Every rank takes the same number of steps. With `drop_last` the `N mod G` positions at the end of an epoch are left out
    (different samples in each epoch), without it the last batch is shorter.

    Raises ValueError for a data set smaller than one global batch, unless the last batch may be shorter.
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
        """Batches of an epoch from `position` on."""
        rest = len(self.index) - position
        return rest // self.global_batch if self.drop_last else -(-rest // self.global_batch)

    def places_from(self, epoch: int, position: int) -> Iterator[Place]:
        """The places of the global batches from there on, without end."""
        while True:
            yield from ((epoch, position + k * self.global_batch) for k in range(self.steps(position)))
            epoch, position = epoch + 1, 0

    def rows_at(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """`[stop - start] int64`: the index rows of the samples at these positions, stand-ins included."""
        return self.quarantine.replace(self.plan.rows(epoch, start, stop), self.plan.seed, epoch, start)

    def shards_from(self, epoch: int, position: int) -> Iterator[int]:
        """The shards of the batches from there on, in order, to the end of the next epoch; without those of stand-ins."""
        yield from self.plan.shards(epoch, position).tolist()
        yield from self.plan.shards(epoch + 1, 0).tolist()

    def own_shards(self, places: list[Place]) -> np.ndarray:
        """`[len(places), B]`: the shard of each of this rank's samples."""
        return self.index.samples["shard"][self.own_rows(places)]

    def own_start(self, place: Place) -> int:
        """The position of this rank's first sample of the global batch at `place`."""
        return place[1] + self.rank * self.batch_size

    def own_rows(self, places: list[Place]) -> np.ndarray:
        """`[len(places), B] int64`: this rank's index rows; past the end of an epoch its last row is repeated."""
        starts, epochs = np.array([self.own_start(place) for place in places]), np.array(places)[:, 0]
        positions = np.minimum(starts[:, None] + np.arange(self.batch_size), len(self.index) - 1)
        rows = np.empty(positions.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            wanted = positions[epochs == epoch]  # the plan is asked once for all of them
            low, high = int(wanted.min()), int(wanted.max()) + 1
            rows[epochs == epoch] = self.rows_at(epoch, low, high)[wanted - low]
        return rows
