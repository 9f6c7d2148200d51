import copy
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from model.hjepa import HJEPA, Level, default_levels

Maker = Callable[..., HJEPA]


@pytest.fixture
def inputs(make_inputs: Callable[..., dict]) -> dict:
    return make_inputs()


def test_the_loss_is_the_weighted_sum_of_its_named_parts(make_model: Maker, inputs: dict) -> None:
    losses = make_model()(**inputs)
    levels = losses["level_0"] + 0.5 * losses["level_1"] + 0.25 * losses["level_2"]
    torch.testing.assert_close(losses["loss"], levels + losses["view"] + 0.1 * losses["sigreg"])


def test_pooled_targets_equal_a_plain_loop(make_model: Maker, inputs: dict) -> None:
    model = make_model().eval()
    whole = inputs["crops"][0]
    maps, _ = model._targets(whole)
    (out,) = model.target([(whole, None)], layers=[level.layer for level in model.levels])
    for level, tokens, pooled in zip(model.levels, out.layers, maps, strict=True):
        normed = F.layer_norm(tokens, tokens.shape[-1:]).view(6, 6, 6, 32)
        cells = [
            normed[:, y : y + level.stride, x : x + level.stride].mean(dim=(1, 2))
            for y in range(0, 6, level.stride)
            for x in range(0, 6, level.stride)
        ]
        torch.testing.assert_close(pooled, torch.stack(cells, dim=1))


def test_masked_pixels_reach_the_student_in_no_way(make_model: Maker, inputs: dict) -> None:
    """Change every pixel outside the context: the student's summaries and predictions stay equal bit for bit."""
    model = make_model().eval()
    seen = torch.zeros(6, 2, 36, dtype=torch.bool).scatter_(2, inputs["plan"].context, True)
    changed = copy.copy(inputs)
    changed["crops"] = list(inputs["crops"])
    for g in range(2):
        mask = seen[:, g].view(6, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
        changed["crops"][g] = torch.where(mask, inputs["crops"][g], torch.randn(6, 3, 48, 48))
    before, after = model(**inputs), model(**changed)
    assert torch.equal(before["view"], after["view"])
    assert not torch.equal(before["level_0"], after["level_0"])  # the targets did change


def test_the_ema_equals_its_closed_form(make_model: Maker) -> None:
    model = make_model()
    start = model.target.vit.blocks[0].mlp.fc1.weight.clone()
    values, expected = [], start.clone()
    for step in range(5):
        with torch.no_grad():
            model.encoder.vit.blocks[0].mlp.fc1.weight.normal_(generator=torch.Generator().manual_seed(step))
        values.append(model.encoder.vit.blocks[0].mlp.fc1.weight.clone())
        model.update_target(0.9)
    expected = 0.9**5 * start + sum(0.1 * 0.9 ** (4 - step) * value for step, value in enumerate(values))
    torch.testing.assert_close(model.target.vit.blocks[0].mlp.fc1.weight, expected)


def test_terms_of_weight_zero_are_not_computed(make_model: Maker, inputs: dict) -> None:
    losses = make_model(view_weight=0.0, sigreg_weight=0.0)(**inputs)
    assert "view" not in losses
    assert "sigreg" not in losses


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0, 0, 0]), (2, [1, 0, 0]), (3, [2, 1, 0]), (12, [11, 7, 3]), (24, [23, 15, 7])]
)
def test_default_levels_exist_for_any_depth(depth: int, layers: list[int]) -> None:
    assert default_levels(depth) == tuple(Level(layer, 2**i, 0.5**i) for i, layer in enumerate(layers))
