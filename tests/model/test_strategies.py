"""The strategies: what the predictor sees, and what it predicts."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from model.geometry import Cells, cell_centres, log_cell_size
from model.hjepa import HJEPA
from model.masks import STRATEGIES

Maker = Callable[..., HJEPA]
Inputs = Callable[..., dict]
# (strategy, globals, locals); the last is `use_multicrop: false`.
CASES = [(name, 2, 4) for name in STRATEGIES] + [("cross_crop_prediction", 2, 0), ("cross_crop_prediction", 1, 3)]
CASES += [("global_only", 1, 0)]


def crops_seen(plan: object, strategy: str, sample: int, target: int) -> list[int]:
    """Return the crops that the predictor sees for a target, by the definition of the strategy."""
    if strategy == "cross_crop_prediction":
        return [int(plan.partners[sample, target].nonzero())]
    views = 0 if plan.partners is None else plan.partners.shape[2]
    return [target, *range(plan.context.shape[1], views)]


def seen_tokens(model: HJEPA, inputs: dict, sample: int, crop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode one crop by itself; return its tokens, centres and log sizes: `[K, D]`, `[K, 2]`, `[K, 2]`."""
    pixels = inputs["crops"][crop][sample : sample + 1]
    box, flip = inputs["boxes"][sample, crop : crop + 1], inputs["flips"][sample, crop : crop + 1]
    grid = pixels.shape[-1] // 8
    keep = inputs["plan"].context[sample, crop : crop + 1] if crop < model.num_global else None
    tokens = model.encoder([(pixels, keep)])[0].tokens[0]
    places = cell_centres(box, flip, grid)[0]
    return tokens, places if keep is None else places[keep[0]], log_cell_size(box, grid).expand(len(tokens), -1)


def errors_of_one(model: HJEPA, inputs: dict, strategy: str, sample: int, target: int) -> list[torch.Tensor]:
    """Return per level `[M_l]` the errors of one global, predicted by itself from exactly the crops it should see."""
    plan = inputs["plan"]
    parts = [seen_tokens(model, inputs, sample, crop) for crop in crops_seen(plan, strategy, sample, target)]
    features, centres, sizes = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    box, flip = inputs["boxes"][sample, target][None], inputs["flips"][sample, target][None]
    asked, wanted = [], []
    maps, _ = model._targets(inputs["crops"][target][sample : sample + 1])
    for level, queries, target_map in zip(model.levels, plan.queries, maps, strict=True):
        cells = queries[sample, target]
        centres = cell_centres(box, flip, model.grid, level.stride)[:, cells]
        asked.append(Cells(centres, log_cell_size(box, model.grid, level.stride).expand(1, len(cells), -1)))
        wanted.append(target_map[0, cells])
    sources = torch.arange(features.shape[1])[None, None]
    predicted = model.predictor(features, Cells(centres, sizes), asked, sources)
    return [F.smooth_l1_loss(part[0], goal, reduction="none").mean(-1) for part, goal in zip(predicted, wanted, strict=True)]


@pytest.mark.parametrize(("strategy", "num_global", "num_local"), CASES)
def test_the_losses_equal_one_global_at_a_time(
    make_model: Maker, make_inputs: Inputs, strategy: str, num_global: int, num_local: int
) -> None:
    inputs = make_inputs(strategy, num_global, num_local)
    model = make_model(num_global_crops=num_global).eval()
    losses = model(**inputs)
    everyone = [(sample, target) for sample in range(6) for target in range(num_global)]
    errors = [errors_of_one(model, inputs, strategy, *one) for one in everyone]
    for rung, error in enumerate(zip(*errors, strict=True)):
        torch.testing.assert_close(losses[f"level_{rung}"], torch.stack(error).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strategy", "num_global", "num_local"), CASES)
def test_every_trainable_parameter_gets_a_gradient_and_no_target_does(
    make_model: Maker, make_inputs: Inputs, strategy: str, num_global: int, num_local: int
) -> None:
    model = make_model(num_global_crops=num_global)
    model(**make_inputs(strategy, num_global, num_local))["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(("strategy", "num_global", "num_local"), CASES)
def test_a_prediction_depends_on_the_pixels_of_its_sources_and_on_no_others(
    make_model: Maker, make_inputs: Inputs, strategy: str, num_global: int, num_local: int
) -> None:
    """Neither the queried pixels nor anything else of the target can leak: their gradient is exactly zero."""
    inputs = make_inputs(strategy, num_global, num_local)
    plan, crops = inputs["plan"], [crop.requires_grad_() for crop in inputs["crops"]]
    model = make_model(num_global_crops=num_global).eval()
    whole = torch.stack(crops[:num_global], dim=1).flatten(0, 1)
    groups = [(whole, plan.context.flatten(0, 1))]
    if num_local:
        groups.append((torch.stack(crops[num_global:], dim=1).flatten(0, 1), None))
    student = [out.tokens for out in model.encoder(groups)]
    queries = model._query_cells(inputs["boxes"], inputs["flips"], plan)
    context = model._context(student, inputs["boxes"], inputs["flips"], plan)
    predictions = model.predictor(*context, queries, plan.sources, plan.real)
    for sample, target in ((0, 0), (3, num_global - 1), (5, 0)):
        chosen = sum(part[sample * num_global + target].square().sum() for part in predictions)
        gradients = torch.autograd.grad(chosen, crops, retain_graph=True, allow_unused=True)
        seen = crops_seen(plan, strategy, sample, target)
        for crop, gradient in enumerate(gradients):
            if gradient is None:
                assert crop not in seen
                continue
            by_token = gradient.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-1, -2)).flatten(1)
            expected = torch.zeros_like(by_token, dtype=torch.bool)
            if crop in seen:
                expected[sample] = True
                if crop < num_global:
                    expected[sample] = torch.zeros(36, dtype=torch.bool).scatter(0, plan.context[sample, crop], True)
            assert torch.equal(by_token > 0, expected)
