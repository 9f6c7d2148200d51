import copy

import pytest
import torch
from torch.nn import functional as F

from model import MultiCropMaskGenerator
from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, Level, default_levels
from model.losses import random_directions

OPTIONS = {
    "num_global_crops": 2, "global_crop_size": 48, "predictor_width": 32, "predictor_depth": 2, "predictor_heads": 2,
    "projector_hidden": 32, "projector_dim": 16, "view_weight": 1.0, "sigreg_weight": 0.1, "sigreg_knots": 17,
}  # fmt: skip
BATCH = 6


def build(**changes: object) -> HJEPA:
    torch.manual_seed(0)
    encoder = MultiCropEncoder(
        "vit_small_patch16_dinov3",
        [48, 16],
        img_size=48,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        init_values=0.1,
    )
    return HJEPA(encoder, default_levels(3), **{**OPTIONS, **changes})


@pytest.fixture
def inputs() -> dict:
    torch.manual_seed(1)
    crops = [torch.randn(BATCH, 3, 48, 48) for _ in range(2)] + [torch.randn(BATCH, 3, 16, 16) for _ in range(4)]
    corners = torch.rand(BATCH, 6, 2, 2).sort(dim=2).values
    directions = random_directions(16, 8, torch.Generator().manual_seed(0), torch.device("cpu"))
    return {
        "crops": crops,
        "boxes": torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.05], dim=-1).clamp(0, 1),
        "flips": torch.rand(BATCH, 6) < 0.5,
        "plan": MultiCropMaskGenerator(grid=6)(BATCH),
        "directions": directions,
    }


def test_every_trainable_parameter_gets_a_gradient_and_no_target_does(inputs: dict) -> None:
    model = build()
    model(**inputs)["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None
        elif not name.endswith(("cls_token", "reg_token")):
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


def test_the_loss_is_the_weighted_sum_of_its_named_parts(inputs: dict) -> None:
    losses = build()(**inputs)
    levels = losses["level_0"] + 0.5 * losses["level_1"] + 0.25 * losses["level_2"]
    torch.testing.assert_close(losses["loss"], levels + losses["view"] + 0.1 * losses["sigreg"])


def test_pooled_targets_equal_a_plain_loop(inputs: dict) -> None:
    model = build().eval()
    whole = inputs["crops"][0]
    maps, _ = model._targets(whole)
    (out,) = model.target([(whole, None)], layers=[level.layer for level in model.levels])
    for level, tokens, pooled in zip(model.levels, out.layers, maps, strict=True):
        normed = F.layer_norm(tokens, tokens.shape[-1:]).view(BATCH, 6, 6, 32)
        cells = [
            normed[:, y : y + level.stride, x : x + level.stride].mean(dim=(1, 2))
            for y in range(0, 6, level.stride)
            for x in range(0, 6, level.stride)
        ]
        torch.testing.assert_close(pooled, torch.stack(cells, dim=1))


def test_masked_pixels_reach_the_student_in_no_way(inputs: dict) -> None:
    """Change every pixel outside the context: the student's summaries and predictions stay equal bit for bit."""
    model = build().eval()
    seen = torch.zeros(BATCH, 2, 36, dtype=torch.bool).scatter_(2, inputs["plan"].context, True)
    changed = copy.copy(inputs)
    changed["crops"] = list(inputs["crops"])
    for g in range(2):
        mask = seen[:, g].view(BATCH, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
        changed["crops"][g] = torch.where(mask, inputs["crops"][g], torch.randn(BATCH, 3, 48, 48))
    before, after = model(**inputs), model(**changed)
    assert torch.equal(before["view"], after["view"])
    assert not torch.equal(before["level_0"], after["level_0"])  # the targets did change


def test_the_ema_equals_its_closed_form() -> None:
    model = build()
    start = model.target.vit.blocks[0].mlp.fc1.weight.clone()
    values, expected = [], start.clone()
    for step in range(5):
        with torch.no_grad():
            model.encoder.vit.blocks[0].mlp.fc1.weight.normal_(generator=torch.Generator().manual_seed(step))
        values.append(model.encoder.vit.blocks[0].mlp.fc1.weight.clone())
        model.update_target(0.9)
    expected = 0.9**5 * start + sum(0.1 * 0.9 ** (4 - step) * value for step, value in enumerate(values))
    torch.testing.assert_close(model.target.vit.blocks[0].mlp.fc1.weight, expected)


def test_terms_of_weight_zero_are_not_computed(inputs: dict) -> None:
    losses = build(view_weight=0.0, sigreg_weight=0.0)(**inputs)
    assert "view" not in losses
    assert "sigreg" not in losses


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0, 0, 0]), (2, [1, 0, 0]), (3, [2, 1, 0]), (12, [11, 7, 3]), (24, [23, 15, 7])]
)
def test_default_levels_exist_for_any_depth(depth: int, layers: list[int]) -> None:
    assert default_levels(depth) == tuple(Level(layer, 2**i, 0.5**i) for i, layer in enumerate(layers))
