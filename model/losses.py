"""The prediction losses, the view term and SIGReg, in float32; N ranks get the values of one rank with their joined batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from model import defaults

MIN_VARIANCE, ITERATIONS = 0.01, 20  # of whitening: of the mean variance; enough for 1,024 channels
KNOTS = 17  # of SIGReg's integral, as in LeJEPA


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of the loss. A term of weight 0 is not computed, and modules that only it needs are not built."""

    prediction: float = defaults.PREDICTION_WEIGHT
    summary: float = defaults.SUMMARY_WEIGHT
    view: float = defaults.VIEW_WEIGHT
    sigreg: float = defaults.SIGREG_WEIGHT
    anchor: float = defaults.ANCHOR_WEIGHT
    colour: float = defaults.COLOUR_WEIGHT


class _SumOverRanks(torch.autograd.Function):
    """All-reduce with a gradient: each rank's result depends on every rank's input, so gradients are summed over ranks too.

    `torch.distributed.nn.functional.all_reduce` has the same gradient, but it is deprecated and refuses `torch.compile`.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, gradient)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, with gradient; without distributed training, the tensor itself."""
    return _SumOverRanks.apply(value) / world_size() if world_size() > 1 else value


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()


class BatchStandardize(nn.Module):
    """Batch normalisation, `[n, D] -> [n, D]`, by the statistics of the global batch, in training and in evaluation.

    Unlike `nn.SyncBatchNorm` it runs on CPUs too, and it keeps no running averages: its projector is not used after training.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance over the global batch, `[D] float32`."""
        mean = mean_over_ranks(x.float().mean(dim=0))
        return mean, mean_over_ranks((x.float() - mean).square().mean(dim=0))

    def forward(self, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        mean, variance = statistics or self.statistics(x)
        return (x.float() - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Whiten(nn.Module):
    """Whitening, `[n, K, D] -> [n, K, D] float32`, by mean and covariance of the global batch's tokens. It has no parameters.

    A hundredth of the mean variance is added to all directions. The inverse square root is that of Newton and Schulz (Higham,
    Functions of Matrices, 2008, chapter 6): matrix products only, which every device has and CUDA graphs can record.
    """

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean `[D]`, and the matrix `[D, D]` that whitens, in float32."""
        x = x.float().flatten(0, -2)
        mean, one = mean_over_ranks(x.mean(dim=0)), torch.eye(x.shape[1], device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            covariance = mean_over_ranks((x - mean).T @ (x - mean) / len(x))
            covariance = covariance + (MIN_VARIANCE * covariance.trace() / len(one)).clamp_min(1e-12) * one
            trace = covariance.trace()
            root, inverse = covariance / trace, one
            for _ in range(ITERATIONS):
                step = 1.5 * one - 0.5 * inverse @ root
                root, inverse = root @ step, step @ inverse
        return mean, inverse / trace.sqrt()

    def forward(self, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        mean, matrix = statistics or self.statistics(x)
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - mean) @ matrix


def anchor_loss(tokens: Tensor, start: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between `[n, K, D]` tokens and those of the start, plus that between their means."""
    tokens, start = tokens.float(), start.float()
    pooled = F.cosine_similarity(tokens.mean(dim=1), start.mean(dim=1), dim=-1)
    return 2 - F.cosine_similarity(tokens, start, dim=-1).mean() - pooled.mean()


def colour_shares(crops: Tensor) -> Tensor:
    """Return the share of each of 64 colours, 4 levels per channel, among a crop's pixels: `[n, 3, S, S] uint8 -> [n, 64]`."""
    levels = (crops >> 6).long()
    codes = (16 * levels[:, 0] + 4 * levels[:, 1] + levels[:, 2]).flatten(1)
    counts = torch.zeros(len(crops), defaults.COLOURS, device=crops.device)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=counts.dtype)) / codes.shape[1]


def view_loss(projections: Tensor, num_global: int) -> Tensor:
    """Return the mean squared distance of views `[B, V, P]`, globals first, to their globals' mean (arXiv 2511.08544, eq. 5)."""
    projections = projections.float()
    centre = projections[:, :num_global].mean(dim=1, keepdim=True)
    return (projections - centre).square().mean()


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularisation: the Epps-Pulley statistic along random directions (arXiv 2511.08544).

    For projections z_1 .. z_N of a view and a direction a, it is N * integral |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, where
    phi(t) = mean_n exp(i t a.z_n) is the empirical characteristic function and exp(-t^2 / 2) that of a standard normal.
    """

    points: Tensor
    normal: Tensor
    weights: Tensor

    def __init__(self, knots: int = KNOTS) -> None:
        super().__init__()
        # The trapezoid rule on 0..3, beyond which the weight is below 0.012; doubled, since the integrand is even.
        points = torch.linspace(0, 3, knots)
        normal = torch.exp(-points.square() / 2)
        trapezoid = torch.full((knots,), 3 / (knots - 1))
        trapezoid[[0, -1]] /= 2
        for name, values in (("points", points), ("normal", normal), ("weights", 2 * trapezoid * normal)):
            self.register_buffer(name, values, persistent=False)

    def forward(self, projections: Tensor, directions: Tensor) -> Tensor:
        """Return the mean statistic of `[B, V, P]` projections along `[P, S]` unit columns, which all ranks must share."""
        samples = len(projections) * world_size()
        # The statistic is a small difference of means, so bfloat16 is not enough.
        with torch.autocast(projections.device.type, enabled=False):
            angles = (projections.float() @ directions)[..., None] * self.points  # [B, V, S, knots]
            real = mean_over_ranks(angles.cos().mean(dim=0))
            imaginary = mean_over_ranks(angles.sin().mean(dim=0))
            error = (real - self.normal).square() + imaginary.square()
            return (error @ self.weights).mean() * samples


def random_directions(width: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw `[width, count] float32` directions, uniform on the sphere, on the device of `generator`."""
    directions = torch.randn(width, count, generator=generator, device=device)
    return directions / directions.norm(dim=0, keepdim=True)
