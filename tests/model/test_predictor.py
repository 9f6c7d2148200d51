import pytest
import torch
from torch.nn import functional as F

from model.geometry import Cells
from model.predictor import Predictor, _last_block


def predictor(width: int = 32, depth: int = 2, encoder_width: int = 8) -> Predictor:
    torch.manual_seed(0)
    return Predictor(encoder_width, width, depth, num_heads=2, num_levels=2)


def cells(n: int, count: int) -> Cells:
    return Cells(torch.rand(n, count, 2), torch.randn(n, count, 2))


def moved(places: Cells, shift: torch.Tensor) -> Cells:
    return Cells(places.centres + shift, places.log_sizes)


def test_moving_everything_in_the_source_changes_no_prediction() -> None:
    model = predictor().eval()
    features, places, queries = torch.randn(3, 20, 8), cells(3, 20), [cells(6, 4), cells(6, 2)]
    sources, shift = torch.randint(20, (3, 2, 7)), torch.tensor([0.3, -0.2])
    here = model(features, places, queries, sources)
    there = model(features, moved(places, shift), [moved(query, shift) for query in queries], sources)
    for before, after in zip(here, there, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    elsewhere = model(features, moved(places, shift), queries, sources)
    assert (elsewhere[0] - here[0]).abs().max().item() > 1e-4


def test_padding_is_ignored() -> None:
    model = predictor().eval()
    features, places, queries = torch.randn(2, 10, 8), cells(2, 10), [cells(2, 3), cells(2, 1)]
    sources = torch.tensor([[[1, 4, 7]], [[2, 3, 9]]])
    padded = torch.cat([sources, torch.tensor([[[5, 5]], [[0, 8]]])], dim=-1)
    real = torch.tensor([True, True, True, False, False]).expand(2, 1, -1)
    expected = model(features, places, queries, sources)
    for ours, theirs in zip(model(features, places, queries, padded, real), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_last_block_equals_timms_on_the_queries_in_value_and_gradient(masked: bool) -> None:
    model = predictor()
    block, x, rope = model.blocks[-1], torch.randn(3, 11, 32), model._rope(torch.rand(3, 11, 2))
    mask = (torch.rand(3, 1, 1, 11) < 0.7) | (torch.arange(11) >= 7) if masked else None
    runs = {"timm": lambda x: block(x, rope=rope, attn_mask=mask)[:, 7:]}
    runs["ours"] = lambda x: _last_block(block, x, rope, mask, 7)
    results = {}
    for name, run in runs.items():
        leaf = x.clone().requires_grad_()
        block.zero_grad(set_to_none=True)
        answer = run(leaf)
        answer.square().sum().backward()
        results[name] = [answer.detach(), leaf.grad, *[parameter.grad for parameter in block.parameters()]]
    torch.testing.assert_close(results["ours"], results["timm"], atol=1e-5, rtol=1e-5)


def test_it_learns_an_answer_that_depends_on_relative_position_alone() -> None:
    """The answer is the content of the token that lies a fixed step away from the query, wherever both are."""
    model, step = predictor(), torch.tensor([0.0, 0.25])
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    sources, losses = torch.arange(16).expand(32, 1, -1), []
    generator = torch.Generator().manual_seed(0)
    line = torch.arange(4) / 4
    grid, sizes = torch.cartesian_prod(line, line), torch.zeros(32, 16, 2)
    for _ in range(200):
        corner = torch.rand(32, 1, 2, generator=generator) * 2
        centres, features = corner + grid, torch.randn(32, 16, 8, generator=generator).sign()
        asked = torch.randint(16, (32, 8, 1), generator=generator)
        query = Cells(torch.take_along_dim(centres, asked, dim=1) - step, sizes[:, :8])
        answer, _ = model(features, Cells(centres, sizes), [query, query], sources)
        loss = F.mse_loss(answer, torch.take_along_dim(features, asked, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9  # knowing nothing is 1
    assert sum(losses[-20:]) / 20 < 0.2
