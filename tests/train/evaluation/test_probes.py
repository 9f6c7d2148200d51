"""Probes that are trained on frozen features, against scikit-learn and against one another."""

from collections.abc import Iterator

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from train.evaluation.features import Features
from train.evaluation.measure import Standardizer, accuracies, linear_heads, linear_probe

CPU = torch.device("cpu")


def blobs(count: int, seed: int, width: int = 6, classes: int = 3, spread: float = 1.0) -> Features:
    """Three classes around fixed centres, in units that differ by dimension."""
    centres = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    rows = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return Features({"last": rows * torch.logspace(-2, 2, width) + 5}, labels)


def test_standardised_features_have_mean_zero_and_deviation_one_and_constants_stay_finite() -> None:
    rows = torch.cat([blobs(20_000, 0).values["last"], torch.full((20_000, 1), 3.0)], dim=1)
    found = Standardizer(rows, CPU)(rows)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(7), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, 1:6].std(dim=0), torch.ones(5), atol=2e-2, rtol=0)
    assert found[:, 6].abs().max() < 1e-2


def test_heads_trained_together_equal_each_trained_alone_with_torchs_sgd() -> None:
    data = blobs(300, 0)
    standard = Standardizer(data.values["last"], CPU)
    rates = (0.01, 0.3)
    heads = linear_heads(data.values["last"], data.labels, 3, rates, 2, standard)
    for rate, found in zip(rates, heads, strict=True):
        head = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        solver = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for rows in torch.randperm(300, generator=generator).split(256):
                solver.zero_grad()
                F.cross_entropy(head(standard(data.values["last"][rows])), data.labels[rows]).backward()
                solver.step()
                schedule.step()
        torch.testing.assert_close(found.weight, head.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias, head.bias, rtol=1e-4, atol=1e-5)


def test_the_linear_probe_reaches_scikit_learns_accuracy_and_prefers_features_that_tell_the_classes_apart() -> None:
    train, test = blobs(2000, 0), blobs(1000, 1)
    noise = {"last": torch.randn(2000, 6), "last4": train.values["last"]}
    test_noise = {"last": torch.randn(1000, 6), "last4": test.values["last"]}
    score, setting = linear_probe(Features(noise, train.labels), Features(test_noise, test.labels), ["last", "last4"], 10, CPU)
    assert setting.startswith("last4, lr ")
    standard = Standardizer(train.values["last"], CPU)
    reference = LogisticRegression(max_iter=1000).fit(standard(train.values["last"]), train.labels)
    assert score == pytest.approx(100 * reference.score(standard(test.values["last"]), test.labels), abs=1.5)
    before = torch.get_rng_state()
    assert (score, setting) == linear_probe(
        Features(noise, train.labels), Features(test_noise, test.labels), ["last", "last4"], 10, CPU
    )
    assert torch.equal(before, torch.get_rng_state())  # measured during a run, it must not move the run's random numbers


def test_accuracies_count_every_row_once() -> None:
    rows, labels = torch.eye(3).repeat(4000, 1), torch.arange(3).repeat(4000)
    heads = [nn.Identity(), lambda inputs: inputs[:, [0, 2, 1]]]
    assert accuracies(heads, Standardizer(rows, CPU), rows, labels) == [100, 100 / 3]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the products here are so small that more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
