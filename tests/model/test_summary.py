"""The summary predictor: equal to a slow reference, and its gradient reaches what it should."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from model.hjepa import HJEPA
from model.predictor import SummaryPredictor


def test_a_cell_is_guessed_from_the_summary_and_its_place_alone() -> None:
    torch.manual_seed(0)
    predictor, summaries = SummaryPredictor(8, [9, 4]), torch.randn(5, 8)
    for level, guesses in enumerate(predictor(summaries)):
        assert guesses.shape == (5, (9, 4)[level], 8)
        for n in range(5):
            for cell in range(guesses.shape[1]):
                hidden = F.gelu(predictor.enter[level](summaries[n]) + predictor.places[level][cell])
                torch.testing.assert_close(guesses[n, cell], predictor.heads[level](hidden))


def test_the_loss_is_that_of_each_global_level_and_cell(
    make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict]
) -> None:
    model, inputs = make_model(False, summary_weight=2.0), make_inputs()
    losses = model(**inputs)
    expected = torch.zeros(())
    for g in range(2):
        kept = inputs["plan"].context[:, g]
        (seen,) = model.encoder([(inputs["crops"][g], kept)])
        targets, _ = model._targets(inputs["crops"][g])
        for level, guess, target in zip(model.levels, model.summary(seen.tokens.mean(dim=1)), targets, strict=True):
            distances = [F.smooth_l1_loss(guess[:, cell], target[:, cell]) for cell in range(target.shape[1])]
            expected = expected + level.weight * torch.stack(distances).mean() / 2
    torch.testing.assert_close(losses["summary"], expected)
    others = model.weights.view * losses["view"] + model.weights.sigreg * losses["sigreg"]
    torch.testing.assert_close(losses["loss"], 2.0 * expected + others)


@pytest.mark.parametrize("strategy", ["global_only", "none"])
def test_its_gradient_reaches_the_whole_encoder_and_not_the_target(
    make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict], strategy: str
) -> None:
    model, inputs = make_model(False, summary_weight=1.0, view_weight=0.0, sigreg_weight=0.0), make_inputs(strategy)
    model(**inputs)["loss"].backward()
    parts = {"encoder": model.encoder, "summary": model.summary}
    without = [
        f"{part}.{name}" for part, module in parts.items() for name, value in module.named_parameters() if value.grad is None
    ]
    assert without == []
    assert all(value.grad is None for value in model.target.parameters())


def test_with_weight_0_it_is_not_built_and_changes_no_number(
    make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict]
) -> None:
    plain, with_it, inputs = make_model(), make_model(summary_weight=1.0), make_inputs()
    assert plain.summary is None
    assert not any("summary" in name for name in plain.state_dict())
    before, after = plain(**inputs), with_it(**inputs)
    for name in set(before) - {"loss"}:
        assert torch.equal(before[name], after[name])
