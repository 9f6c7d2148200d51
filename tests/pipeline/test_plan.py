import numpy as np
import pytest

from pipeline.plan import Plan

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
