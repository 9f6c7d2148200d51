"""The prediction loss, the view term and SIGReg, in float32, equal on N ranks to one rank that holds the joined batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model import defaults


@dataclass(frozen=True)
class LossWeights:
    """Of the terms of the loss. With 0 a term is left out, and what only serves it is not built."""

    prediction: float = defaults.PREDICTION_WEIGHT
    summary: float = defaults.SUMMARY_WEIGHT
    view: float = defaults.VIEW_WEIGHT
    sigreg: float = defaults.SIGREG_WEIGHT


class _SumOverRanks(torch.autograd.Function):
    """Every rank's result depends on every rank's input, so gradients are summed over the ranks too."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks, with gradient; the tensor itself outside of distributed training."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _SumOverRanks.apply(value) / dist.get_world_size()
    return value


def masked_mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The mean of the chosen (`bool`, same shape) values; 0 when none is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def joint_masked_mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`masked_mean` such that its mean over the ranks is that of their joined values."""
    count = mean_over_ranks(chosen.sum().float())
    return (values * chosen).sum() / count.clamp(min=1e-6)


def weighted_sum(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()


def prediction_losses(
    errors: Sequence[torch.Tensor],
    weights: Sequence[float],
    inside: Sequence[torch.Tensor] | None = None,
    exclude_covered: bool = False,
) -> dict[str, torch.Tensor]:
    """`level_0` ..: mean error by level. `errors`: per level `[n, M_l] float32`; `inside`: per level `[n, M_l] bool`.

    With `inside` also, without gradient, `inside` and `outside`, weighted sums of the levels' means over these cells and the
    others, and `covered_share`, how many are inside. `exclude_covered` leaves the cells inside out of `level_0` ..
    """
    if inside is None:
        return {f"level_{rung}": error.mean() for rung, error in enumerate(errors)}
    outside = [~part for part in inside]
    losses = {}
    for rung, error in enumerate(errors):
        losses[f"level_{rung}"] = joint_masked_mean(error, outside[rung]) if exclude_covered else error.mean()
    with torch.no_grad():
        for name, chosen in (("inside", inside), ("outside", outside)):
            means = [masked_mean(error, part) for error, part in zip(errors, chosen, strict=True)]
            losses[name] = weighted_sum(weights, means)
        losses["covered_share"] = torch.cat(list(inside), dim=1).float().mean()
    return losses


class BatchStandardize(nn.Module):
    """Batch normalisation with the statistics of the whole global batch, in training and evaluation alike.

    `[n, D] -> [n, D]`. Unlike `nn.SyncBatchNorm` it also runs on CPUs, and it keeps no running averages: the projector it
    serves is never used after training.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        mean = mean_over_ranks(x.mean(dim=0))
        variance = mean_over_ranks((x - mean).square().mean(dim=0))
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def view_loss(projections: torch.Tensor, num_global: int) -> torch.Tensor:
    """Mean squared distance of every view to the mean of its image's global views (LeJEPA, arXiv 2511.08544, equation 5).

    `projections`: `[B, V, P]`, globals first. Returns a scalar.
    """
    projections = projections.float()
    centre = projections[:, :num_global].mean(dim=1, keepdim=True)
    return (projections - centre).square().mean()


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularisation: the Epps-Pulley statistic along random directions (arXiv 2511.08544).

    The empirical characteristic function of each view's projections, along each direction, is compared with that of a
    standard normal at `knots` points in 0..3, weighted by the normal's own; the integral is scaled by the number of samples.
    """

    points: torch.Tensor
    normal: torch.Tensor
    weights: torch.Tensor

    def __init__(self, knots: int) -> None:
        super().__init__()
        points = torch.linspace(0, 3, knots)
        normal = torch.exp(-points.square() / 2)
        trapezoid = torch.full((knots,), 3 / (knots - 1))
        trapezoid[[0, -1]] /= 2
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("normal", normal, persistent=False)
        # The integrand is even in t: twice the half line.
        self.register_buffer("weights", 2 * trapezoid * normal, persistent=False)

    def forward(self, projections: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """`projections`: `[B, V, P]`; `directions`: `[P, S]`, unit columns, the same on all ranks. Returns a scalar."""
        samples = len(projections)
        if dist.is_available() and dist.is_initialized():
            samples *= dist.get_world_size()
        with torch.autocast(projections.device.type, enabled=False):
            angles = (projections.float() @ directions)[..., None] * self.points  # [B, V, S, knots]
            real = mean_over_ranks(angles.cos().mean(dim=0))
            imaginary = mean_over_ranks(angles.sin().mean(dim=0))
            error = (real - self.normal).square() + imaginary.square()
            return (error @ self.weights).mean() * samples


def random_directions(width: int, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """`[width, count] float32`: directions uniform on the sphere, drawn on the device of `generator`."""
    directions = torch.randn(width, count, generator=generator, device=device)
    return directions / directions.norm(dim=0, keepdim=True)
