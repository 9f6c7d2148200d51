"""Probes trained on frozen features: linear for a grid of settings at once, and logistic regression on a few images."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from train.evaluation.features import Features
from train.optim import cosine

LINEAR_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
BATCH = 256
HELD_OUT = 10  # every tenth training image chooses the learning rate and the layers
STANDARD_EPS = 1e-3  # of the standard deviation: constant features stay constant
LOWSHOT_STRENGTH = 1.0  # C of the logistic regression, scikit-learn's own


class Standard:
    """Shifts and scales features by the mean and deviation of the training features, which no label enters."""

    def __init__(self, train: torch.Tensor, device: torch.device) -> None:
        total = torch.zeros(2, train.shape[1], dtype=torch.float64)
        for part in train.split(8192):
            total += torch.stack([part.double().sum(dim=0), part.double().square().sum(dim=0)])
        mean, square = total / len(train)
        deviation = (square - mean.square()).clamp_min(0).sqrt() + STANDARD_EPS
        self._mean, self._deviation = (value.float().to(device) for value in (mean, deviation))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, D]` of any floating type on any device `-> [n, D] float32`."""
        return (rows.to(self._mean.device).float() - self._mean) / self._deviation


def train_heads(
    features: torch.Tensor, labels: torch.Tensor, classes: int, rates: Sequence[float], epochs: int, standard: Standard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[R, D, C]` and biases `[R, C]`: linear classifiers, one for each learning rate, all trained in the same pass.

    `features`: `[n, D]`; each batch is brought to the device once for all. SGD with momentum 0.9 and a cosine schedule.
    """
    device = standard(features[:1]).device
    weight = torch.zeros(len(rates), features.shape[1], classes, device=device, requires_grad=True)
    bias = torch.zeros(len(rates), classes, device=device, requires_grad=True)
    groups = [torch.tensor(rates, device=device).view(-1, 1, 1), torch.tensor(rates, device=device).view(-1, 1)]
    moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
    generator = torch.Generator().manual_seed(0)
    steps, step = epochs * -(-len(features) // BATCH), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(BATCH):
            batch, wanted = standard(features[rows]), labels[rows].to(device)
            logits = batch @ weight + bias[:, None]
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.repeat(len(rates)), reduction="sum") / len(rows)
            gradients = torch.autograd.grad(loss, (weight, bias))
            with torch.no_grad():
                scale = cosine(1.0, 0.0, step / steps)
                for parameter, rate, moment, gradient in zip((weight, bias), groups, moments, gradients, strict=True):
                    moment.mul_(0.9).add_(gradient)
                    parameter.sub_(scale * rate * moment)
            step += 1
    return weight.detach(), bias.detach()


@torch.inference_mode()
def head_accuracies(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, standard: Standard
) -> list[float]:
    """Percent right of each of the R heads."""
    right = torch.zeros(len(weight))
    for rows, wanted in zip(features.split(8192), labels.split(8192), strict=True):
        answers = (standard(rows) @ weight + bias[:, None]).argmax(dim=2)
        right += (answers == wanted.to(answers.device)).sum(dim=1).cpu()
    return (100.0 * right / len(features)).tolist()


def linear_probe(
    train: Features, test: Features, names: Sequence[str], epochs: int, device: torch.device
) -> tuple[float, str]:
    """Percent right on `test`, and which of the grid won: `last, lr 0.1`.

    The grid is `names` of features times LINEAR_RATES. Its winner is chosen on every tenth training image, never on `test`.
    """
    classes = int(torch.maximum(train.labels.max(), test.labels.max())) + 1
    kept_out = torch.arange(len(train.labels)) % HELD_OUT == 0
    best = (-1.0, 0.0, "")
    for name in names:
        values = train.values[name]
        standard = Standard(values, device)
        heads = train_heads(values[~kept_out], train.labels[~kept_out], classes, LINEAR_RATES, epochs, standard)
        chosen_by = head_accuracies(values[kept_out], train.labels[kept_out], *heads, standard)
        scores = head_accuracies(test.values[name], test.labels, *heads, standard)
        for rate, held_out, score in zip(LINEAR_RATES, chosen_by, scores, strict=True):
            if held_out > best[0]:
                best = (held_out, score, f"{name}, lr {rate:g}")
    return best[1], best[2]


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
    """Percent right on `test` of a logistic regression on `shots` images of each class, for each drawing of them.

    Features are standardised over all training images, and divided by the square root of their number, so that the
    regularisation means the same for all widths.
    """
    values, labels = train.values["last"], train.labels
    standard, root = Standard(values, device), values.shape[1] ** 0.5
    classes = int(torch.maximum(labels.max(), test.labels.max())) + 1
    scores = []
    for seed in seeds:
        rows = few_of_each(labels, shots, seed)
        weight, bias = logistic_regression(
            standard(values[rows]) / root, labels[rows].to(device), classes, LOWSHOT_STRENGTH
        )
        heads = (weight.float() / root)[None], bias.float()[None]
        scores += head_accuracies(test.values["last"], test.labels, *heads, standard)
    return scores
