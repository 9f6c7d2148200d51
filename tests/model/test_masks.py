import pytest
import torch

from model import MultiCropMaskGenerator
from model.masks import level_grid, pool_cells


@pytest.mark.parametrize(("grid", "context", "query"), [(14, 0.4, 0.4), (4, 0.5, 0.5), (16, 0.3, 0.6), (7, 0.1, 0.2)])
def test_there_are_exactly_k_context_and_m_query_tokens_and_none_is_both(
    grid: int, context: float, query: float
) -> None:
    masks = MultiCropMaskGenerator(grid=grid, context_ratio=context, query_ratio=query, strides=(1, 2, 4))
    tokens = grid * grid
    for seed in range(20):
        torch.manual_seed(seed)
        plan = masks(batch_size=16)
        assert plan.context.shape == (16, 2, round(context * tokens))
        assert plan.queries[0].shape == (16, 2, round(query * tokens))
        both = torch.cat([plan.context, plan.queries[0]], dim=-1)
        assert all(len(set(row)) == len(row) for row in both.flatten(0, 1).tolist())
        assert int(both.min()) >= 0
        assert int(both.max()) < tokens
        for stride, cells in zip((1, 2, 4), plan.queries, strict=True):
            assert int(cells.max()) < level_grid(grid, stride) ** 2
            assert all(len(set(row)) == len(row) for row in cells.flatten(0, 1).tolist())


def test_every_cell_of_the_grid_can_be_a_target_and_a_context() -> None:
    torch.manual_seed(0)
    plan = MultiCropMaskGenerator(grid=14)(batch_size=2000)
    for chosen in (plan.queries[0], plan.context):
        share = torch.bincount(chosen.flatten(), minlength=196) / 4000
        assert float(share.min()) > 0.02


def test_the_last_row_and_column_are_masked_as_often_as_the_first() -> None:
    torch.manual_seed(0)
    plan = MultiCropMaskGenerator(grid=14)(batch_size=5000)
    share = (torch.bincount(plan.queries[0].flatten(), minlength=196) / 10_000).view(14, 14)
    for edge in (share[-1] - share[0], share[:, -1] - share[:, 0]):
        assert float(edge.abs().max()) < 0.025  # five standard deviations of a frequency over 10,000 draws


def test_every_placement_of_a_rectangle_that_fits_is_equally_likely() -> None:
    masks = MultiCropMaskGenerator(grid=6, num_masks=1, mask_scale=(1 / 9, 1 / 9), aspect_ratio=(1.0, 1.0))
    torch.manual_seed(0)
    blocks = masks._blocks((5000, 2), None).flatten(0, 1)
    assert bool((blocks.sum(dim=(1, 2)) == 4).all())  # 2x2 cells of 36
    corner = blocks.flatten(1).argmax(dim=1)
    counts = torch.bincount(corner, minlength=36).view(6, 6)
    assert bool((counts[5] == 0).all())
    assert bool((counts[:, 5] == 0).all())
    assert float((counts[:5, :5] / 10_000 - 1 / 25).abs().max()) < 0.01


def test_queries_lie_inside_the_rectangles_when_these_cover_enough() -> None:
    masks = MultiCropMaskGenerator(
        grid=14, num_masks=1, mask_scale=(0.5, 0.5), aspect_ratio=(1.0, 1.0), query_ratio=0.3
    )
    torch.manual_seed(3)
    plan = masks(64)
    torch.manual_seed(3)
    covered = masks._blocks((64, 2), None).flatten(2)
    assert bool((covered.gather(2, plan.queries[0]) == 1).all())
    assert bool((covered.gather(2, plan.context) == 0).all())


def test_coarse_queries_are_the_cells_with_the_most_queried_tokens() -> None:
    masks = MultiCropMaskGenerator(grid=14)
    torch.manual_seed(1)
    plan = masks(32)
    queried = torch.zeros(64, 196).scatter_(1, plan.queries[0].flatten(0, 1), 1.0).view(64, 1, 14, 14)
    for stride, cells in zip((2, 4), plan.queries[1:], strict=True):
        share = pool_cells(queried, stride).flatten(1)
        chosen = torch.zeros_like(share, dtype=torch.bool).scatter_(1, cells.flatten(0, 1), True)
        for row in range(64):
            assert float(share[row][chosen[row]].min()) >= float(share[row][~chosen[row]].max()) - 1e-6


def test_the_same_seed_gives_the_same_plan() -> None:
    masks = MultiCropMaskGenerator()
    plans = [masks(4, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(plans[0].context, plans[1].context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_ratio": 0.7, "query_ratio": 0.5}, "137 context and 98 query tokens of 196"),
        ({"grid": 2, "context_ratio": 0.1}, "0 context and 2 query tokens of 4"),
        ({"masking_strategy": "none"}, "allowed are global_only"),
    ],
)
def test_an_impossible_combination_is_refused_with_numbers(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiCropMaskGenerator(**options)
