"""What the pipeline hands to the model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class CropBatch:
    """All crops of B samples. Unpacks as `crops, labels`.

    `crops`: V tensors `[B, 3, S, S]`, globals first, on the pipeline's device: `float32`, normalised, or `uint8`, 0..255, as the
    loader was asked for.
    `labels`: `[B] int64`, -1 where unlabelled. `boxes`: `[B, V, 4] float32`, y0, x0, y1, x1 of each crop in its source image,
    0..1. `flips`: `[B, V] bool`, crop mirrored left to right. `positions`: `[B] int64`, places in the epoch's order. All four
    lie on the same device as the crops.
    """

    crops: list[torch.Tensor]
    labels: torch.Tensor
    boxes: torch.Tensor
    flips: torch.Tensor
    positions: torch.Tensor

    def __iter__(self) -> Iterator[list[torch.Tensor] | torch.Tensor]:
        yield self.crops
        yield self.labels


def normalize(crops: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """`[..., 3, S, S] uint8 -> float32`: `(crops / 255 - mean) / std` for each channel."""
    offset, spread = torch.from_numpy(scaling(mean, std)).to(crops.device).T.view(2, 3, 1, 1)
    return (crops - offset).div_(spread)


def scaling(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """`[3, 2] float32`: what is taken from a channel's grey levels, and what they are then divided by."""
    return 255 * np.array([mean, std], np.float32).T
