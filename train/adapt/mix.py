"""The end of a run from starting weights: its encoder is mixed back with them, and the mixture of the best k-NN is kept."""

import copy
import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# In public runs from DINOv3 weights, all sets above the first number gained or tied, and nearly all below the second lost.
FAR, NEAR, MAX_IMAGES = -2.3, -3.0, 2000


@torch.no_grad()
def mixed(start: MultiCropEncoder, trained: MultiCropEncoder, share: float) -> MultiCropEncoder:
    """Return a new encoder: `share` of each weight from `trained`, the rest from `start`; at 0 and 1, bit for bit the one."""
    encoder = copy.deepcopy(trained)
    for weight, before in zip(encoder.parameters(), start.parameters(), strict=True):
        weight.copy_(torch.lerp(before, weight, share))
    return encoder


def mixtures(start: MultiCropEncoder, trained: MultiCropEncoder) -> dict[float, MultiCropEncoder]:
    """Return the mixtures that a run chooses from, by the share of `trained`."""
    return {share: mixed(start, trained, share).eval() for share in SHARES}


def best_share(hits: Mapping[float, torch.Tensor]) -> float:
    """Return the share of the most hits, 0 if they are not more than those of the start by two standard errors.

    `hits`: `[n] bool` by share, whether a mixture classifies an image: the same images for all, so their differences count.
    """
    gains = {share: hit.double() - hits[0.0].double() for share, hit in hits.items()}
    best = max(gains, key=lambda share: float(gains[share].mean()))
    return best if gains[best].mean() > 2 * gains[best].std() / len(gains[best]) ** 0.5 else 0.0


def uniformity(features: torch.Tensor) -> float:
    """Return log mean exp(-2 |x - y|^2) over pairs of unit-length `[n, D]` features: 0 for one point, lower when spread out."""
    x = F.normalize(features[:: math.ceil(len(features) / MAX_IMAGES)].float(), dim=1)
    return float(torch.exp(-2 * torch.pdist(x).square()).mean().log())


def described(value: float) -> str:
    """Return what a uniformity of the starting weights' features on a run's images means, as one sentence."""
    meaning = "between the two: watch k-NN against the row of the untouched weights"
    if value > FAR:
        meaning = "close together: the weights hardly know such images, and sets like this gained most from continuing"
    elif value < NEAR:
        meaning = "spread out: the weights tell such images apart already, and sets like this often lost by continuing"
    return f"log-uniformity of the starting weights' features on these images: {value:.2f}, {meaning}"
