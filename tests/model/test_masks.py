import itertools

import pytest
import torch

from model import MultiCropMaskGenerator
from model.masks import STRATEGIES, level_grid, pool_cells


def generator(
    masking_strategy: str = "global_only", num_global_crops: int = 2, num_local_crops: int = 6, **options: object
) -> MultiCropMaskGenerator:
    return MultiCropMaskGenerator(masking_strategy, num_global_crops, num_local_crops, **options)


@pytest.mark.parametrize(("grid", "context", "query"), [(14, 0.4, 0.4), (4, 0.5, 0.5), (16, 0.3, 0.6), (7, 0.1, 0.2)])
def test_there_are_exactly_k_context_and_m_query_tokens_and_none_is_both(grid: int, context: float, query: float) -> None:
    masks = generator(grid=grid, context_ratio=context, query_ratio=query, strides=(1, 2, 4))
    tokens = grid * grid
    for seed in range(5):
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
    plan = generator(grid=14)(batch_size=2000)
    for chosen in (plan.queries[0], plan.context):
        share = torch.bincount(chosen.flatten(), minlength=196) / 4000
        assert float(share.min()) > 0.02


def test_the_last_row_and_column_are_masked_as_often_as_the_first() -> None:
    torch.manual_seed(0)
    plan = generator(grid=14)(batch_size=5000)
    share = (torch.bincount(plan.queries[0].flatten(), minlength=196) / 10_000).view(14, 14)
    for edge in (share[-1] - share[0], share[:, -1] - share[:, 0]):
        assert float(edge.abs().max()) < 0.025  # five standard deviations of a frequency over 10,000 draws


def test_every_placement_of_a_rectangle_that_fits_is_equally_likely() -> None:
    masks = generator(grid=6, num_masks=1, mask_scale=(1 / 9, 1 / 9), aspect_ratio=(1.0, 1.0))
    torch.manual_seed(0)
    blocks = masks._rectangles((5000, 2), None).flatten(0, 1)
    assert bool((blocks.sum(dim=(1, 2)) == 4).all())  # 2x2 cells of 36
    corner = blocks.flatten(1).argmax(dim=1)
    counts = torch.bincount(corner, minlength=36).view(6, 6)
    assert bool((counts[5] == 0).all())
    assert bool((counts[:, 5] == 0).all())
    assert float((counts[:5, :5] / 10_000 - 1 / 25).abs().max()) < 0.01


def test_queries_lie_inside_the_rectangles_when_these_cover_enough() -> None:
    masks = generator(grid=14, num_masks=1, mask_scale=(0.5, 0.5), aspect_ratio=(1.0, 1.0), query_ratio=0.3)
    torch.manual_seed(3)
    plan = masks(64)
    torch.manual_seed(3)
    covered = masks._rectangles((64, 2), None).flatten(2)
    assert bool((covered.gather(2, plan.queries[0]) == 1).all())
    assert bool((covered.gather(2, plan.context) == 0).all())


def test_coarse_queries_are_the_cells_with_the_most_queried_tokens() -> None:
    masks = generator(grid=14)
    torch.manual_seed(1)
    plan = masks(32)
    queried = torch.zeros(64, 196).scatter_(1, plan.queries[0].flatten(0, 1), 1.0).view(64, 1, 14, 14)
    for stride, cells in zip((2, 4), plan.queries[1:], strict=True):
        share = pool_cells(queried, stride).flatten(1)
        chosen = torch.zeros_like(share, dtype=torch.bool).scatter_(1, cells.flatten(0, 1), True)
        for row in range(64):
            assert float(share[row][chosen[row]].min()) >= float(share[row][~chosen[row]].max()) - 1e-6


def test_the_same_seed_gives_the_same_plan() -> None:
    masks = generator()
    plans = [masks(4, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(plans[0].context, plans[1].context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_ratio": 0.7, "query_ratio": 0.5}, "137 context and 98 query tokens of 196"),
        ({"grid": 2, "context_ratio": 0.1}, "0 context and 2 query tokens of 4"),
        ({"masking_strategy": "nothing"}, "allowed are global_only"),
        ({"mask_scale": (0.2, 0.9)}, r"up to 16.3 x 15.3 tokens \(height x width\), larger than the 14x14 grid"),
        ({"aspect_ratio": (0.1, 1.0)}, r"up to 6.3 x 19.8 tokens \(height x width\), larger than the 14x14 grid"),
        ({"num_masks": 0}, "num_masks 0"),
        (
            {"masking_strategy": "global_with_local_context", "num_local_crops": 0},
            "2 global and 0 local crops: it needs a global crop and a local crop",
        ),
        (
            {"masking_strategy": "cross_crop_prediction", "num_global_crops": 1, "num_local_crops": 0},
            "1 global and 0 local crops: it needs a global crop and another crop",
        ),
        ({"num_global_crops": 0}, "0 global and 6 local crops: it needs a global crop"),
    ],
)
def test_an_impossible_combination_is_refused_with_numbers(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator(**options)


def frequency_of_context(masks: MultiCropMaskGenerator, unions: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Return how often each cell is context, `[cells] float64`, for unions of rectangles `[N, cells] bool` with chances `[N]`.

    Context is filled from the free cells in random order, then from the covered ones.
    """
    covered = unions.sum(dim=1, keepdim=True)
    free = unions.shape[1] - covered
    of_free = (masks.num_context / free).clamp(max=1)
    of_covered = (masks.num_context - free).clamp(min=0) / covered
    return chances.double() @ torch.where(unions, of_covered, of_free).double()


def rectangles(grid: int, height: int, width: int) -> torch.Tensor:
    """Return every placement of a rectangle that fits the grid, `[placements, cells] bool`."""
    unions = []
    for top, left in itertools.product(range(grid - height + 1), range(grid - width + 1)):
        union = torch.zeros(grid, grid, dtype=torch.bool)
        union[top : top + height, left : left + width] = True
        unions.append(union.flatten())
    return torch.stack(unions)


def rectangles_of_any_size(mask_scale: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all rectangles on 14x14 at aspect ratios 0.75..1.5, `[N, 196] bool`, and their chances, integrated over 500x500."""
    middles = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    area = (mask_scale[0] + (mask_scale[1] - mask_scale[0]) * middles)[:, None] * 196
    aspect = 0.75 * 2.0 ** middles[None]
    counts = torch.bincount(((area * aspect).sqrt().round() * 15 + (area / aspect).sqrt().round()).long().flatten())
    sizes = counts.nonzero().flatten().tolist()
    parts = [rectangles(14, *divmod(size, 15)) for size in sizes]
    chances = [counts[size].double().expand(len(part)) / len(part) for size, part in zip(sizes, parts, strict=True)]
    return torch.cat(parts), torch.cat(chances) / counts.sum()


def drawn_frequency(masks: MultiCropMaskGenerator) -> torch.Tensor:
    """Return how often each cell is context in 5,000 draws of eight globals, each with exactly K and M tokens."""
    torch.manual_seed(0)
    plan = masks(5_000)
    both = torch.cat([plan.context, plan.queries[0]], dim=-1).sort(dim=-1).values
    assert bool((both.diff(dim=-1) > 0).all())
    assert both.shape[-1] == masks.num_context + masks.num_queries
    count = torch.bincount(plan.context.flatten(), minlength=masks.grid**2)
    return count / (5_000 * masks.num_global_crops)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_context_frequencies_of_four_rectangles_are_the_enumerated_ones(strategy: str) -> None:
    """All 9^4 placements of four 2x2 rectangles on a 4x4 grid."""
    masks = generator(strategy, 8, 2, grid=4, num_masks=4, mask_scale=(0.25, 0.25), aspect_ratio=(1.0, 1.0), local_grid=2)
    one = rectangles(4, 2, 2)
    unions = torch.stack([one[list(four)].any(dim=0) for four in itertools.product(range(9), repeat=4)])
    expected = frequency_of_context(masks, unions, torch.full((len(unions),), 9**-4.0))
    assert float((drawn_frequency(masks) - expected).abs().max()) < 0.01


def test_context_frequencies_of_one_rectangle_of_any_size_are_the_integrated_ones() -> None:
    masks = generator(num_global_crops=8, num_masks=1, mask_scale=(0.15, 0.6), aspect_ratio=(0.75, 1.5))
    expected = frequency_of_context(masks, *rectangles_of_any_size((0.15, 0.6)))
    assert float((drawn_frequency(masks) - expected).abs().max()) < 0.01


def test_context_frequencies_of_the_default_masks_on_the_default_grid_are_the_expected_ones() -> None:
    """Four rectangles of any size on 14x14: the chance that a rectangle covers a cell is enumerated, their union is not.

    A cell escapes four independent rectangles with the fourth power of its chance to escape one. How many cells are free
    around it is averaged over 100,000 unions, drawn from the list of all rectangles.
    """
    masks, (every, chances) = generator(num_global_crops=8), rectangles_of_any_size((0.15, 0.2))
    torch.manual_seed(1)
    chosen = torch.multinomial(chances.float(), 4 * 100_000, replacement=True).view(4, -1)
    union = every[chosen[0]] | every[chosen[1]] | every[chosen[2]] | every[chosen[3]]
    covered = 1 - (1 - chances @ every.double()) ** 4
    assert float((union.float().mean(dim=0) - covered).abs().max()) < 0.005
    expected = frequency_of_context(masks, union, torch.full((len(union),), 1e-5))
    assert float((drawn_frequency(masks) - expected).abs().max()) < 0.01


def test_each_other_crop_is_equally_often_the_one_to_predict_from() -> None:
    torch.manual_seed(0)
    plan = generator("cross_crop_prediction", grid=4, local_grid=2)(10_000)
    assert bool((plan.partners.sum(dim=-1) == 1).all())
    share = plan.partners.float().mean(dim=0)
    expected = torch.full((2, 8), 1 / 7)
    expected[0, 0] = expected[1, 1] = 0
    assert float((share - expected).abs().max()) < 0.015


@pytest.mark.parametrize(("context", "local_grid"), [(0.4, 6), (0.2, 6), (0.4, 4)])
def test_cross_crop_sources_are_the_tokens_of_the_partner(context: float, local_grid: int) -> None:
    masks = generator("cross_crop_prediction", 3, 4, context_ratio=context, local_grid=local_grid)
    plan, num_local = masks(200), local_grid**2
    owner = torch.tensor([0, 1, 2] * masks.num_context).sort().values.tolist()
    owner += torch.tensor([3, 4, 5, 6] * num_local).sort().values.tolist()
    for sample, target in itertools.product(range(200), range(3)):
        real = plan.real[sample, target]
        sources = plan.sources[sample, target][real].tolist()
        partner = int(plan.partners[sample, target].nonzero())
        assert sources == [token for token, crop in enumerate(owner) if crop == partner]
