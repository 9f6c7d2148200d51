"""The colour term: equal to a slow reference, and its gradient reaches the encoder."""

import math
from collections.abc import Callable

import pytest
import torch

from model.hjepa import HJEPA
from model.losses import colour_shares


def test_shares_count_the_pixels_of_each_colour() -> None:
    torch.manual_seed(0)
    crops = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8)
    for crop, shares in zip(crops, colour_shares(crops), strict=True):
        counts = [0] * 64
        for y in range(5):
            for x in range(5):
                red, green, blue = (int(crop[channel, y, x]) // 64 for channel in range(3))
                counts[16 * red + 4 * green + blue] += 1
        assert (25 * shares).round().tolist() == counts


@pytest.mark.parametrize("strategy", ["none", "global_only"])
def test_the_term_is_the_cross_entropy_of_every_crops_colours_and_trains_the_encoder(
    make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict], strategy: str
) -> None:
    model, inputs = make_model(False, colour_weight=3.0), make_inputs(strategy)
    inputs["crops"] = [(64 * crop).clamp(-127, 128).add(127).to(torch.uint8) for crop in inputs["crops"]]
    losses = model(**inputs)
    assert model.colour is not None
    terms = []
    for view, crop in enumerate(inputs["crops"]):
        kept = inputs["plan"].context[:, view] if view < 2 else None
        (seen,) = model.encoder([(crop, kept)])
        terms.append(-(colour_shares(crop) * model.colour(seen.tokens.mean(dim=1)).log_softmax(-1)).sum(-1).mean())
    torch.testing.assert_close(losses["colour"], torch.stack(terms).mean())
    assert float(losses["colour"].detach()) == pytest.approx(math.log(64), abs=1)
    others = model.weights.view * losses["view"] + model.weights.sigreg * losses["sigreg"]
    torch.testing.assert_close(losses["loss"], 3.0 * losses["colour"] + others)
    gradient = torch.autograd.grad(losses["colour"], model.encoder.vit.patch_embed.proj.weight)[0]
    assert gradient.abs().sum() > 0


def test_with_weight_0_it_is_not_built(make_model: Callable[..., HJEPA]) -> None:
    assert not any("colour" in name for name in make_model().state_dict())
