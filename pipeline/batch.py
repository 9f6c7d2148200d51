"""What the pipeline hands to the model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CropBatch:
    """All crops of B samples. Unpacks as `crops, labels`.

    `crops`: V tensors `[B, 3, S, S] float32`, normalised, globals first, on the pipeline's device.
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
