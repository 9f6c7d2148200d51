"""An encoder and its moving average, which is what is evaluated and exported, whatever the loss."""

import copy

import torch
from torch import nn

from model.encoder import MultiCropEncoder


class TaughtEncoder(nn.Module):
    """Student `encoder` and EMA `target`, whose parameters need no gradient; `update_target` moves them."""

    def __init__(self, encoder: MultiCropEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.target = copy.deepcopy(encoder).requires_grad_(False)

    def update_target(self, momentum: float, skip: torch.Tensor | None = None) -> None:
        """Move the target encoder towards the student: target = momentum * target + (1 - momentum) * student.

        `skip`: `[] float32` on the device; where it is 1, the target stays as it is. The host never reads it.
        """
        move_average(self.target, self.encoder, momentum, skip)


@torch.no_grad()
def move_average(target: nn.Module, student: nn.Module, momentum: float, skip: torch.Tensor | None) -> None:
    """The equation of `update_target`, for any two modules with the same parameters."""
    targets: list[torch.Tensor] = list(target.parameters())
    students: list[torch.Tensor] = list(student.parameters())
    keep = torch.full((), momentum, device=targets[0].device)
    if skip is not None:
        keep = torch.where(skip > 0, 1.0, keep)
    torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, list(torch._foreach_mul(students, 1 - keep)))
