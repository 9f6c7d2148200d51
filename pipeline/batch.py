"""What the pipeline hands to the model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CropBatch:
    """All crops of B samples. Unpacks as `crops, labels`.

    `crops`: V tensors `[B, 3, S, S]`, globals first: `float32`, normalised, or `uint8`, 0..255, as the loader was asked for.
    `labels`: `[B] int64`, -1 where unlabelled. `boxes`: `[B, V, 4] float32`, y0, x0, y1, x1 of each crop in its source image,
    0..1. `flips`: `[B, V] bool`, crop mirrored left to right. `positions`: `[B] int64`, places in the epoch's order. All are on
    the loader's device.
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
        offset, spread = (
            255 * torch.tensor(values, dtype=torch.float32, device=crops.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (crops - offset).div_(spread)
