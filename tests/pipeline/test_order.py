"""The order of samples, without DALI: test_loader.py shows that the loader keeps it."""

from itertools import islice

import numpy as np
import pytest

from pipeline.order import BatchSequence, BatchStart, Plan
from pipeline.quarantine import Quarantine
from pipeline.shards.index import ShardIndex

SIZES = np.array([7, 1, 30, 12, 50])


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_an_epoch_is_a_permutation_of_all_rows(epoch: int) -> None:
    rows = Plan(SIZES, seed=3).rows(epoch, 0, 100)
    assert sorted(rows) == list(range(100))


def test_epochs_and_seeds_differ() -> None:
    orders = [Plan(SIZES, seed).rows(epoch, 0, 100) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first != second).mean() > 0.8


def test_any_slice_equals_that_slice_of_the_whole_epoch() -> None:
    plan = Plan(SIZES, seed=5)
    whole = plan.rows(2, 0, 100)
    for start in range(0, 101, 3):
        for stop in range(start, 101, 7):
            np.testing.assert_array_equal(plan.rows(2, start, stop), whole[start:stop])


def test_rows_of_one_shard_stay_together() -> None:
    rows = Plan(SIZES, seed=1).rows(0, 0, 100)
    shards = np.repeat(np.arange(5), SIZES)[rows]
    assert (np.diff(shards) != 0).sum() == 4


def test_without_shuffle_the_stored_order_is_kept() -> None:
    np.testing.assert_array_equal(Plan(SIZES, 0, shuffle=False).rows(9, 10, 20), np.arange(10, 20))


def test_each_place_of_a_small_shard_is_equally_likely() -> None:
    plan = Plan(np.array([4]), seed=0)
    orders = np.stack([plan.rows(epoch, 0, 4) for epoch in range(4000)])
    for place in range(4):
        # 4000 draws of probability 1/4: six standard deviations are 164.
        assert abs(np.bincount(orders[:, place], minlength=4) - 1000).max() < 164


def test_positions_outside_the_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"positions 90\.\.101 lie outside an epoch of 100"):
        Plan(SIZES, 0).rows(0, 90, 101)


def sequence_of(index: ShardIndex, batch_size: int, rank: int, world_size: int) -> BatchSequence:
    return BatchSequence(index, Plan(index.counts, seed=2), Quarantine(index), batch_size, rank, world_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_ranks_together_see_every_row_once_for_any_number_of_ranks(index: ShardIndex, batch_size: int) -> None:
    for world_size in range(1, 65):
        if world_size * batch_size > len(index):
            continue
        ranks = [sequence_of(index, batch_size, rank, world_size) for rank in range(world_size)]
        starts = list(islice(ranks[0].iter_batch_starts(BatchStart(0, 0)), 2 * ranks[0].steps(0)))
        rows = np.stack([sequence.rank_rows(starts) for sequence in ranks], 1)  # [steps, ranks, B]
        assert starts[len(starts) // 2] == (1, 0)
        for epoch, part in enumerate(np.split(rows.reshape(len(starts), -1), 2)):
            # In order, too: rank 0 first, as a single rank with the global batch would see them.
            np.testing.assert_array_equal(part.reshape(-1), Plan(index.counts, 2).rows(epoch, 0, part.size))
            assert len(np.unique(part)) == part.size > len(index) - world_size * batch_size


def test_a_bad_row_is_replaced_at_its_position_only_for_any_number_of_ranks(index: ShardIndex) -> None:
    planned = Plan(index.counts, 2).rows(0, 0, len(index))
    bad = planned[[0, 50, 51]].tolist()
    seen = []
    for world_size in (1, 4, 17):
        sequences = [sequence_of(index, 2, rank, world_size) for rank in range(world_size)]
        for sequence in sequences:
            sequence.quarantine.add(dict.fromkeys(bad, "empty file"))
        starts = list(islice(sequences[0].iter_batch_starts(BatchStart(0, 0)), sequences[0].steps(0)))
        rows = np.stack([sequence.rank_rows(starts) for sequence in sequences], 1).reshape(-1)
        assert not set(bad) & set(rows.tolist())
        assert np.flatnonzero(rows != planned[: len(rows)]).tolist() == [0, 50, 51]
        seen.append(rows[:60].tolist())
    assert seen[0] == seen[1] == seen[2]
