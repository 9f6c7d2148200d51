"""Training with only the view term and SIGReg, on masked globals or, like LeJEPA, on complete ones."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from model import MultiCropMaskGenerator
from model.hjepa import HJEPA
from model.masks import MaskPlan

Maker = Callable[..., HJEPA]


@pytest.fixture
def inputs(make_inputs: Callable[..., dict]) -> dict:
    return make_inputs()


def plan_without_masks(batch: int = 6) -> MaskPlan:
    return MultiCropMaskGenerator("none", 2, 4, grid=6, local_grid=2, strides=())(batch)


def test_unmasked_globals_keep_all_tokens_in_order_and_draw_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plan = plan_without_masks()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(plan.context, torch.arange(36).expand(6, 2, 36))
    assert plan.queries == ()
    assert (plan.real, plan.partners) == (None, None)


@torch.no_grad()
def slow_lejepa(model: HJEPA, inputs: dict) -> float:
    """LeJEPA's loss, crop by crop and image by image in Python: equation 5 of arXiv 2511.08544, and the Epps-Pulley integral."""
    views = [model.encoder([(crop, None)])[0].tokens.mean(dim=1) for crop in inputs["crops"]]
    flat = torch.cat(views)
    z = model.projector(flat).double().unflatten(0, (len(views), -1))  # [V, B, P]; standardised over all rows
    count, images, width = z.shape
    view = 0.0
    for image in range(images):
        centre = (z[0, image] + z[1, image]) / 2
        view += sum(float((z[v, image] - centre).square().sum()) for v in range(count))
    sigreg = 0.0
    for v in range(count):
        for direction in inputs["directions"].double().T:
            samples = (z[v] @ direction).tolist()
            values = []
            for knot in range(17):
                t = 3 * knot / 16
                real = sum(math.cos(t * x) for x in samples) / images - math.exp(-t * t / 2)
                imaginary = sum(math.sin(t * x) for x in samples) / images
                values.append((real**2 + imaginary**2) * math.exp(-t * t / 2))
            integral = sum((a + b) / 2 * 3 / 16 for a, b in pairwise(values))
            sigreg += 2 * integral * images
    directions = inputs["directions"].shape[1]
    return model.weights.view * view / (count * images * width) + model.weights.sigreg * sigreg / (count * directions)


def test_the_loss_of_whole_globals_without_prediction_is_lejepas(make_model: Maker, inputs: dict) -> None:
    model = make_model(with_predictor=False, view_weight=4.0, sigreg_weight=0.4)
    losses = model(**{**inputs, "plan": plan_without_masks()})
    assert set(losses) == {"view", "sigreg", "loss", "features"}
    assert losses["loss"].item() == pytest.approx(slow_lejepa(model, inputs), rel=1e-4)
    assert losses["features"].shape == (6, 32)
    assert not losses["features"].requires_grad


def test_the_view_terms_do_not_depend_on_the_predictor(make_model: Maker, inputs: dict) -> None:
    with_it, without = make_model(), make_model(with_predictor=False)
    without.load_state_dict({k: v for k, v in with_it.state_dict().items() if not k.startswith("predictor")})
    both, alone = with_it(**inputs), without(**inputs)
    assert torch.equal(both["view"], alone["view"])
    assert torch.equal(both["sigreg"], alone["sigreg"])
    assert torch.equal(alone["loss"], alone["view"] + 0.1 * alone["sigreg"])


def test_the_prediction_weight_multiplies_the_levels_alone(make_model: Maker, inputs: dict) -> None:
    once, half = make_model()(**inputs), make_model(prediction_weight=0.5)(**inputs)
    levels = once["level_0"] + 0.5 * once["level_1"] + 0.25 * once["level_2"]
    assert torch.equal(once["level_0"], half["level_0"])
    torch.testing.assert_close(once["loss"] - half["loss"], 0.5 * levels)


@pytest.mark.slow
def test_without_prediction_the_step_is_one_graph(make_model: Maker, inputs: dict) -> None:
    model, counter = make_model(with_predictor=False), CompileCounter()
    whole = {**inputs, "plan": plan_without_masks()}
    expected = model(**whole)["loss"]
    model.compile(backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(**whole)["loss"], expected)
    assert counter.frame_count == 1
