"""Probes trained on frozen features: linear and attentive heads, and logistic regression on a few images of each class.

Heads for a grid of learning rates are trained together; every tenth training image, never the test split, chooses the best.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.text import Every
from train.evaluation.features import Features, TokenStream
from train.optim import cosine

LINEAR_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
LINEAR_BATCH = 256
ATTENTIVE_RATES = (1e-3, 3e-3, 1e-2)
ATTENTIVE_EPOCHS, LEAST_STEPS = 10, 1000  # more epochs where that many are fewer steps
HEAD_WIDTH = 64  # of one attention head, at most
LOWSHOT_STRENGTH = 1.0  # C of the logistic regression, scikit-learn's default
HELD_OUT = 10  # every tenth training image chooses the settings
STANDARD_EPS = 1e-3  # of the standard deviation: constant features stay constant
CHUNK = 8192  # rows that are standardised at once
PROGRESS_EVERY_S = 5.0

log = logging.getLogger(__name__)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Inputs of the heads, and labels `[n] int64` on the same device."""


def fit(name: str, heads: nn.ModuleList, optimizer: torch.optim.Optimizer, batches: Batches, steps: int) -> None:
    """Train all heads on the same batches; each head has a parameter group, whose rate falls to 0 along half a cosine."""
    rates, progress = [group["lr"] for group in optimizer.param_groups], Every(PROGRESS_EVERY_S)
    for step, (inputs, labels) in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = cosine(rate, 0.0, step / steps)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([F.cross_entropy(head(inputs), labels) for head in heads]).sum().backward()
        optimizer.step()
        if progress.due():
            log.info("%s probe: step %s of %s ...", name, f"{step + 1:,}", f"{steps:,}")


def head_groups(heads: nn.ModuleList, rates: Sequence[float]) -> list[dict]:
    """Parameter groups for `fit`."""
    return [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]


@torch.inference_mode()
def accuracies(heads: Iterable[Callable[[torch.Tensor], torch.Tensor]], batches: Batches) -> list[float]:
    """Percent correct of each head."""
    heads = list(heads)
    correct, count = [0] * len(heads), 0
    for inputs, labels in batches:
        count += len(labels)
        for number, head in enumerate(heads):
            correct[number] += int((head(inputs).argmax(dim=1) == labels).sum())
    return [100.0 * found / max(count, 1) for found in correct]


def is_held_out(positions: torch.Tensor) -> torch.Tensor:
    """`[n] bool`"""
    return positions % HELD_OUT == 0


class Standard:
    """Standardises features by the mean and deviation of the training features; labels play no part."""

    def __init__(self, train: torch.Tensor, device: torch.device) -> None:
        total = torch.zeros(2, train.shape[1], dtype=torch.float64)
        for part in train.split(CHUNK):
            total += torch.stack([part.double().sum(dim=0), part.double().square().sum(dim=0)])
        mean, square = total / len(train)
        deviation = (square - mean.square()).clamp_min(0).sqrt() + STANDARD_EPS
        self._mean, self._deviation = (value.float().to(device) for value in (mean, deviation))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, D]` of any floating type on any device `-> [n, D] float32`."""
        return (rows.to(self._mean.device).float() - self._mean) / self._deviation

    def batches(self, rows: torch.Tensor, labels: torch.Tensor) -> Batches:
        """All rows in order, standardised, for `accuracies`."""
        for part, wanted in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True):
            yield self(part), wanted.to(self._mean.device)

    def shuffled(self, rows: torch.Tensor, labels: torch.Tensor, epochs: int) -> Batches:
        """Batches of several epochs, always in the same random order, for `fit`."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows), generator=generator).split(LINEAR_BATCH):
                yield self(rows[chosen]), labels[chosen].to(self._mean.device)


def linear_heads(
    features: torch.Tensor, labels: torch.Tensor, classes: int, rates: Sequence[float], epochs: int, standard: Standard
) -> nn.ModuleList:
    """Linear classifiers of `[n, D]` features, one for each learning rate: SGD with momentum 0.9, from zero weights."""
    width, device = features.shape[1], standard(features[:1]).device
    heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, classes, device=device) for _ in rates)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    steps = epochs * -(-len(features) // LINEAR_BATCH)
    optimizer = torch.optim.SGD(head_groups(heads, rates), momentum=0.9)
    fit("linear", heads, optimizer, standard.shuffled(features, labels, epochs), steps)
    return heads


def linear_probe(
    train: Features, test: Features, names: Sequence[str], epochs: int, device: torch.device
) -> tuple[float, str]:
    """Percent correct on `test`, and the best setting of the grid `names` of features x LINEAR_RATES: `last, lr 0.1`."""
    classes = int(torch.maximum(train.labels.max(), test.labels.max())) + 1
    held_out = is_held_out(torch.arange(len(train.labels)))
    found: list[tuple[float, float, str]] = []
    for name in names:
        values = train.values[name]
        standard = Standard(values, device)
        heads = linear_heads(values[~held_out], train.labels[~held_out], classes, LINEAR_RATES, epochs, standard)
        chosen_by = accuracies(heads, standard.batches(values[held_out], train.labels[held_out]))
        scores = accuracies(heads, standard.batches(test.values[name], test.labels))
        settings = [f"{name}, lr {rate:g}" for rate in LINEAR_RATES]
        found += zip(chosen_by, scores, settings, strict=True)
    return best(found)


def best(found: Iterable[tuple[float, float, str]]) -> tuple[float, str]:
    """Score and setting of the first (held-out score, score, setting) with the highest held-out score."""
    _, score, setting = max(found, key=lambda each: each[0])
    return score, setting


class AttentiveProbe(nn.Module):
    """`[n, N, D] -> [n, C]` logits: normed tokens, pooled by one learned query, mapped to classes.

    Equal to `nn.MultiheadAttention` with one query for all images, in another order: such a query can be multiplied into the
    keys' weights and the tokens pooled before the values' weights are, so that no token is projected.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        heads = -(-width // HEAD_WIDTH)
        while width % heads:
            heads += 1
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        attention, normed = self.attention, self.norm(tokens)
        to_query, to_key, to_value = attention.in_proj_weight.unflatten(0, (3, attention.num_heads, -1))
        query_bias, _, value_bias = attention.in_proj_bias.view(3, -1)  # the keys' shifts all scores of a head alike
        query = (to_query @ self.query[0, 0] + query_bias.view(attention.num_heads, -1)) * attention.head_dim**-0.5
        scores = normed @ torch.einsum("hw,hwd->dh", query, to_key)
        pooled = scores.softmax(dim=1).transpose(1, 2) @ normed  # [n, heads, D]
        values = torch.einsum("nhd,hwd->nhw", pooled, to_value).flatten(1) + value_bias
        return self.classify(attention.out_proj(values))


def attentive_probe(
    train: TokenStream, test: TokenStream, width: int, classes: int, device: torch.device
) -> tuple[float, str]:
    """Percent correct on `test`, and the best of ATTENTIVE_RATES.

    `width`: D of the tokens. The labels of both streams are below `classes`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = nn.ModuleList(AttentiveProbe(width, classes) for _ in ATTENTIVE_RATES).to(device)
    optimizer = torch.optim.AdamW(head_groups(heads, ATTENTIVE_RATES), weight_decay=0.01)
    epochs = max(ATTENTIVE_EPOCHS, -(-LEAST_STEPS // train.batches))

    def part(held_out: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for tokens, labels, positions in train.epoch():
            rows = is_held_out(positions) == held_out
            yield tokens[rows], labels[rows]

    shuffled = (batch for _ in range(epochs) for batch in part(held_out=False))
    fit("attentive", heads, optimizer, shuffled, epochs * train.batches)
    chosen_by = accuracies(heads, part(held_out=True))
    scores = accuracies(heads, ((tokens, labels) for tokens, labels, _ in test.epoch()))
    return best(zip(chosen_by, scores, [f"lr {rate:g}" for rate in ATTENTIVE_RATES], strict=True))


def few_of_each(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`[count * classes] int64`: `count` random rows of each class, or all it has."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])


def logistic_regression(
    rows: torch.Tensor, labels: torch.Tensor, classes: int, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[D, C]` and `[C]`, float64: the minimum of sum of cross-entropies + |weights|^2 / (2 * strength), by L-BFGS."""
    x = rows.double()
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels, reduction="sum") + weight.square().sum() / (2 * strength)
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def lowshot_accuracies(
    train: Features, test: Features, shots: int, seeds: Sequence[int], device: torch.device
) -> list[float]:
    """Percent correct on `test` of a logistic regression on `shots` images of each class, for each seed that draws them.

    Features are standardised over all training images and divided by the square root of their width, so that the
    regularisation means the same for all widths.
    """
    values, labels = train.values["last"], train.labels
    standard, root = Standard(values, device), values.shape[1] ** 0.5
    classes = int(torch.maximum(labels.max(), test.labels.max())) + 1
    heads = []
    for seed in seeds:
        rows = few_of_each(labels, shots, seed)
        scaled = standard(values[rows]) / root
        weight, bias = logistic_regression(scaled, labels[rows].to(device), classes, LOWSHOT_STRENGTH)
        heads.append(partial(F.linear, weight=weight.T.float() / root, bias=bias.float()))
    return accuracies(heads, standard.batches(test.values["last"], test.labels))
