"""The batch that the pipeline yields, and its normalisation."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch


@dataclass(frozen=True)
class CropBatch:
    """All crops of B samples. Unpacks as `crops, labels`.

    `crops`: V tensors `[B, 3, S, S]`, globals first: `float32`, normalised, or `uint8`, 0..255, depending on the loader.
    `labels`: `[B] int64`, -1 if unlabelled. `boxes`: `[B, V, 4] float32`, y0, x0, y1, x1 of each crop in its source image,
    0..1. `flips`: `[B, V] bool`, crop mirrored left to right. `positions`: `[B] int64`, positions in the epoch's order. All are
    on the loader's device.
    """

    crops: list[torch.Tensor]
    labels: torch.Tensor
    boxes: torch.Tensor
    flips: torch.Tensor
    positions: torch.Tensor

    def __iter__(self) -> Iterator[list[torch.Tensor] | torch.Tensor]:
        yield self.crops
        yield self.labels


@dataclass(frozen=True)
class Normalization:
    """`[..., 3, S, S] uint8 -> float32`: `(crops / 255 - mean) / std` for each channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        return (crops - _levels(self.mean, crops.device)).div_(_levels(self.std, crops.device))

    @property
    def scaling(self) -> np.ndarray:
        """`[3, 2] float32`: each channel's offset, which is subtracted from its grey levels, and its spread, the divisor."""
        return 255 * np.array([self.mean, self.std], np.float32).T


@cache  # a copy to a GPU would wait for it on every call
def _levels(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """Return `[3, 1, 1]`, from 0..1 to grey levels."""
    return 255 * torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
