"""Probes that are trained on frozen features, against scikit-learn and against one another."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from pipeline.dataset import centre_crop_dataset
from pipeline.loader import MultiCropLoader, build_multicrop_dataloader
from pipeline.shards.index import ShardIndex
from train.evaluation import probes
from train.evaluation.features import Features
from train.evaluation.measure import Standardizer, accuracies, linear_heads, linear_probe
from train.evaluation.probes import AttentiveProbe, TokenStream, attentive_probe

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
    assert accuracies(heads, Standardizer(rows, CPU).batches(rows, labels)) == [100, 100 / 3]


def colour_tokens(crops: torch.Tensor) -> torch.Tensor:
    """`[n, 16, 3]`: colours of a 4x4 grid."""
    return F.adaptive_avg_pool2d(crops, 4).flatten(2).transpose(1, 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the products here are so small that more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def streams(index: ShardIndex) -> tuple[TokenStream, TokenStream]:
    """Tokens of photographs that are labelled by being redder than the median one."""

    def loader(labelled: ShardIndex) -> MultiCropLoader:
        dataset = centre_crop_dataset(labelled, 16, 1.0)
        return build_multicrop_dataloader(dataset, 16, device="cpu", num_workers=1, shuffle=False, drop_last=False)

    means = torch.cat([batch.crops[0].mean(dim=(2, 3)) for batch in loader(index)])
    redness = means[:, 0] - means[:, 2]
    samples = index.samples.copy()
    samples["label"] = (redness > redness.median()).numpy()
    redder = replace(index, samples=samples)
    return TokenStream(loader(redder), colour_tokens), TokenStream(loader(redder), colour_tokens)


def test_tokens_are_the_same_whether_kept_or_made_again_for_each_epoch(
    streams: tuple[TokenStream, TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, again = streams
    first = list(kept.epoch())
    assert sum(len(labels) for _, labels, _ in first) == 103
    monkeypatch.setattr(probes, "TOKENS_SHARE", 0.0)
    list(again.epoch())
    assert kept._store
    assert not again._store
    for one, other, new in zip(first, kept.epoch(), again.epoch(), strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, other, new, strict=True))


def test_the_attentive_probe_learns_what_it_can_and_repeats_itself(
    streams: tuple[TokenStream, TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 400)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = attentive_probe(*streams, 3, 2, CPU)
    assert found[0] > 85
    assert found == attentive_probe(*streams, 3, 2, CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("width", [64, 100, 432])
def test_the_attentive_probe_is_torchs_attention_with_one_query(width: int) -> None:
    torch.manual_seed(0)
    probe, tokens = AttentiveProbe(width, 5), torch.randn(3, 7, width)
    for parameter in probe.parameters():  # biases too, which torch starts at 0
        nn.init.normal_(parameter, std=0.3)
    normed = probe.norm(tokens)
    expected, _ = probe.attention(probe.query.expand(3, -1, -1), normed, normed)
    torch.testing.assert_close(probe(tokens), probe.classify(expected[:, 0]), atol=1e-4, rtol=1e-4)
