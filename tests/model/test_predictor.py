import pytest
import torch
from torch.nn import functional as F

from model.predictor import Predictor, _last_block


def predictor(width: int = 32, depth: int = 2, encoder_width: int = 8) -> Predictor:
    torch.manual_seed(0)
    return Predictor(encoder_width, width, depth, num_heads=2, num_levels=2)


def test_moving_everything_in_the_source_changes_no_prediction() -> None:
    model = predictor().eval()
    tokens, places, queries = torch.randn(3, 20, 8), torch.rand(3, 20, 2), [torch.rand(6, 4, 2), torch.rand(6, 2, 2)]
    sizes, query_sizes = torch.randn(3, 20, 2), [torch.randn(6, 4, 2), torch.randn(6, 2, 2)]
    sources = torch.randint(20, (3, 2, 7))
    here = model(tokens, places, sizes, sources, None, queries, query_sizes)
    shift = torch.tensor([0.3, -0.2])
    there = model(tokens, places + shift, sizes, sources, None, [place + shift for place in queries], query_sizes)
    for before, after in zip(here, there, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    moved = model(tokens, places + shift, sizes, sources, None, queries, query_sizes)
    assert (moved[0] - here[0]).abs().max().item() > 1e-4


def test_sources_that_fill_up_are_ignored() -> None:
    model = predictor().eval()
    tokens, places, sizes = torch.randn(2, 10, 8), torch.rand(2, 10, 2), torch.randn(2, 10, 2)
    queries, query_sizes = [torch.rand(2, 3, 2), torch.rand(2, 1, 2)], [torch.randn(2, 3, 2), torch.randn(2, 1, 2)]
    sources = torch.tensor([[[1, 4, 7]], [[2, 3, 9]]])
    padded = torch.cat([sources, torch.tensor([[[5, 5]], [[0, 8]]])], dim=-1)
    real = torch.tensor([True, True, True, False, False]).expand(2, 1, -1)
    expected = model(tokens, places, sizes, sources, None, queries, query_sizes)
    for ours, theirs in zip(model(tokens, places, sizes, padded, real, queries, query_sizes), expected, strict=True):
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
    """Tokens anywhere in the source; the answer is the content of the one that lies a fixed step away from the query."""
    model, step = predictor(), torch.tensor([0.0, 0.25])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sources, losses = torch.arange(16).expand(32, 1, -1), []
    generator = torch.Generator().manual_seed(0)
    line = torch.arange(4) / 4
    grid = torch.cartesian_prod(line, line)
    for _ in range(400):
        corner = torch.rand(32, 1, 2, generator=generator) * 2
        places, tokens = corner + grid, torch.randn(32, 16, 8, generator=generator).sign()
        asked = torch.randint(16, (32, 8), generator=generator)[..., None].expand(-1, -1, 2)
        queries = places.gather(1, asked) - step
        sizes = torch.zeros(32, 16, 2)
        answer, _ = model(tokens, places, sizes, sources, None, [queries, queries], [sizes[:, :8]] * 2)
        loss = F.mse_loss(answer, tokens.gather(1, asked[..., :1].expand(-1, -1, 8)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9  # knowing nothing is 1
    assert sum(losses[-20:]) / 20 < 0.2
