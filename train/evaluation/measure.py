"""Scores of frozen features: weighted k-NN, a linear probe and RankMe."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.loader import MultiCropLoader
from pipeline.text import Every
from train.evaluation.features import Extractor, Features, extract
from train.optim import cosine

KNN_TEMPERATURE = 0.07  # of the weighted vote, as in DINO (arXiv 2104.14294, appendix) and Wu et al. 2018
TRAIN_CHUNK, TEST_CHUNK = 32_768, 1024  # one block of similarities takes 128 MiB
LINEAR_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
LINEAR_BATCH = 256
HELD_OUT_EVERY = 10  # every tenth training image chooses the learning rate, so that the test split does not
STD_EPS = 1e-3  # added to the standard deviation, so that constant features stay constant
CHUNK_ROWS = 8192  # standardized at once
PROGRESS_EVERY_S = 5.0


log = logging.getLogger(__name__)


class Scores(NamedTuple):
    """Scores of one extractor, and the features they were measured on. Accuracies are percentages of the test split.

    `knn`: accuracy by feature name and k, `knn["last"][20]`. `linear`: accuracy and the best setting, `last, lr 0.1`. What was
    not asked for is empty or None.
    """

    train: Features
    test: Features
    knn: dict[str, dict[int, float]]
    linear: tuple[float, str] | None
    rankme: float | None


def measure(
    loaders: tuple[MultiCropLoader, MultiCropLoader], extractors: Mapping[str, Extractor], device: torch.device, *,
    ks: Sequence[int] = (), linear_epochs: int = 0, with_rankme: bool = False,
) -> dict[str, Scores]:  # fmt: skip
    """Extract the features of both splits, one pass each, and return the scores of each extractor by its name.

    `loaders`: centre crops of train and val, as `train.build.build_evaluation_loaders(config)` returns them. `ks`: neighbours
    of the k-NN, which scores `last` and every `level_i`; `linear_epochs`: of the linear probe, which chooses between the `last*`
    features; `with_rankme`: of the test split's `last`. Put the model into eval mode first. Raises ValueError when the features
    do not fit in memory.
    """
    train_features, test_features = (extract(loader, extractors) for loader in loaders)
    scores = {}
    for name, train in train_features.items():
        test = test_features[name]
        pooled = [feature for feature in train.values if feature.startswith("last")]
        knn = {
            feature: knn_accuracies(values, train.labels, test.values[feature], test.labels, ks, device)
            for feature, values in train.values.items()
            if ks and feature not in pooled[1:]  # the concatenated last blocks serve the linear probe only
        }
        linear = linear_probe(train, test, pooled, linear_epochs, device) if linear_epochs else None
        scores[name] = Scores(train, test, knn, linear, rankme(test.values["last"]) if with_rankme else None)
    return scores


def rankme(features: torch.Tensor, eps: float = 1e-7) -> float:
    """Return the effective rank of `[n, D]` features: exp of the entropy of their singular values (arXiv 2210.02885, eq. 1)."""
    features = features.double()
    # Singular values are roots of the eigenvalues of the smaller Gram matrix: far cheaper on a GPU than an SVD.
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(eps) + eps
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: torch.Tensor) -> float:
    """Return the standard deviation of unit-length `[n, D]` features, averaged over D: 1/sqrt(D) on a sphere, 0 if collapsed."""
    return float(F.normalize(features.float(), dim=1).std(dim=0).mean())


def nearest_neighbours(
    train: torch.Tensor, test: torch.Tensor, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine similarities `[m, k] float32`, highest first, and rows of `train` `[m, k] int64`, on `device`.

    `train`: `[n, D]`, `test`: `[m, D]`, of any floating type, on any device. Where n is smaller than k, k is n.
    """
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(train), TRAIN_CHUNK):
        keys = F.normalize(train[start : start + TRAIN_CHUNK].to(device).float(), dim=1).T
        for number, queries in enumerate(test.split(TEST_CHUNK)):
            nearest, rows = (F.normalize(queries.to(device).float(), dim=1) @ keys).topk(min(k, keys.shape[1]), dim=1)
            rows = rows + start
            if start == 0:
                best.append((nearest, rows))
                continue
            # Merge with the nearest of the chunks before.
            nearest, rows = (torch.cat(pair, dim=1) for pair in zip(best[number], (nearest, rows), strict=True))
            nearest, order = nearest.topk(min(k, nearest.shape[1]), dim=1)
            best[number] = (nearest, rows.gather(1, order))
    similarities, neighbours = zip(*best, strict=True)
    return torch.cat(similarities), torch.cat(neighbours)


def knn_accuracies(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, ks: Sequence[int],
    device: torch.device,
) -> dict[int, float]:  # fmt: skip
    """Return by k the percentage of `test` (`[m, D]`) whose label wins the vote of its k nearest in `train` (`[n, D]`).

    Votes are weighted by exp(cosine similarity / 0.07). Where n is smaller than k, all n vote.
    """
    similarity, rows = nearest_neighbours(train, test, max(ks), device)
    labels, truth, classes = train_labels.to(device)[rows], test_labels.to(device), num_classes(train_labels, test_labels)
    correct = {k: int((vote(labels[:, :k], similarity[:, :k], classes) == truth).sum()) for k in ks}
    return {k: 100.0 * count / len(test) for k, count in correct.items()}


def leave_one_out_hits(features: Features, k: int, device: torch.device) -> torch.Tensor:
    """Return `[n] bool`: True for images whose label wins the vote of their k nearest others, by the feature `last`."""
    values, labels = features.values["last"], features.labels.to(device)
    similarity, rows = nearest_neighbours(values, values, k + 1, device)
    itself = rows == torch.arange(len(rows), device=device)[:, None]
    # An image that is not among its own nearest is behind copies of itself: they vote, all but the last.
    similarity, order = similarity.masked_fill(itself, -torch.inf).sort(dim=1, descending=True)
    return vote(labels[rows.gather(1, order)][:, :k], similarity[:, :k], num_classes(labels)) == labels


def vote(labels: torch.Tensor, similarity: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the class `[m] int64` that wins the vote of neighbours, `labels` and cosine `similarity` `[m, k]`."""
    winners = []
    for label, near in zip(labels.split(TEST_CHUNK), similarity.split(TEST_CHUNK), strict=True):
        votes = torch.zeros(len(label), classes, device=label.device)
        winners.append(votes.scatter_add_(1, label, torch.exp(near / KNN_TEMPERATURE)).argmax(dim=1))
    return torch.cat(winners)


def num_classes(*labels: torch.Tensor) -> int:
    """Return one more than the largest label."""
    return 1 + max(int(each.max()) for each in labels)


class Standardizer:
    """Shifts and scales features to the training features' mean 0 and standard deviation 1, without looking at labels."""

    def __init__(self, train: torch.Tensor, device: torch.device) -> None:
        total = torch.zeros(2, train.shape[1], dtype=torch.float64)
        for rows in train.split(CHUNK_ROWS):
            total += torch.stack([rows.double().sum(dim=0), rows.double().square().sum(dim=0)])
        mean, square = total / len(train)
        std = (square - mean.square()).clamp_min(0).sqrt() + STD_EPS
        self._mean, self._std = (value.float().to(device) for value in (mean, std))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, D]` of any floating type on any device `-> [n, D] float32`."""
        return (rows.to(self._mean.device).float() - self._mean) / self._std


@torch.inference_mode()
def accuracies(
    heads: Iterable[Callable[[torch.Tensor], torch.Tensor]], standardizer: Standardizer, rows: torch.Tensor, labels: torch.Tensor
) -> list[float]:
    """Return the percentage of `rows`, `[n, D]`, to which each head gives their labels, `[n] int64`."""
    heads = list(heads)
    correct = [0] * len(heads)
    for part, truth in zip(rows.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        inputs = standardizer(part)
        for number, head in enumerate(heads):
            correct[number] += int((head(inputs).argmax(dim=1) == truth.to(inputs.device)).sum())
    return [100.0 * hits / max(len(rows), 1) for hits in correct]


def is_held_out(positions: torch.Tensor) -> torch.Tensor:
    """Return `[n] bool`: True for the training images that choose the settings."""
    return positions % HELD_OUT_EVERY == 0


def linear_heads(
    features: torch.Tensor, labels: torch.Tensor, classes: int, rates: Sequence[float], epochs: int,
    standardizer: Standardizer,
) -> nn.ModuleList:  # fmt: skip
    """Return a linear classifier of `[n, D]` features per learning rate, trained from zero weights by SGD with momentum 0.9.

    All see the same batches, always in the same random order; each rate falls to 0 along half a cosine.
    """
    width, device = features.shape[1], standardizer(features[:1]).device
    heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, classes, device=device) for _ in rates)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)  # draws no random numbers, so that measuring does not disturb a training run
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer, progress = torch.optim.SGD(groups, momentum=0.9), Every(PROGRESS_EVERY_S)
    steps, generator = epochs * -(-len(features) // LINEAR_BATCH), torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(features), generator=generator) for _ in range(epochs))
    for step, batch in enumerate(rows for order in orders for rows in order.split(LINEAR_BATCH)):
        inputs, truth = standardizer(features[batch]), labels[batch].to(device)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = cosine(rate, 0.0, step / steps)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([F.cross_entropy(head(inputs), truth) for head in heads]).sum().backward()
        optimizer.step()
        if progress.due():
            log.info("linear probe: step %s of %s ...", f"{step + 1:,}", f"{steps:,}")
    return heads


def linear_probe(train: Features, test: Features, names: Sequence[str], epochs: int, device: torch.device) -> tuple[float, str]:
    """Return the accuracy on `test` and the best setting of the grid `names` of features x LINEAR_RATES: `last, lr 0.1`."""
    held_out, classes = is_held_out(torch.arange(len(train.labels))), num_classes(train.labels, test.labels)
    trials = list[tuple[float, float, str]]()  # accuracy on held-out training images and on the test split, setting
    for name in names:
        values, standardizer = train.values[name], Standardizer(train.values[name], device)
        heads = linear_heads(values[~held_out], train.labels[~held_out], classes, LINEAR_RATES, epochs, standardizer)
        validation = accuracies(heads, standardizer, values[held_out], train.labels[held_out])
        scores = accuracies(heads, standardizer, test.values[name], test.labels)
        trials += zip(validation, scores, (f"{name}, lr {rate:g}" for rate in LINEAR_RATES), strict=True)
    return max(trials, key=lambda trial: trial[0])[1:]
