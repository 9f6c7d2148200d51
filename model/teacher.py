"""A student encoder and its teacher: the exponential moving average (EMA) that is evaluated and exported, whatever the loss."""

import copy

import torch
from torch import Tensor, nn

from model.encoder import MultiCropEncoder


class StudentTeacher(nn.Module):
    """The student `encoder`, trained by gradient, and the `target`, its EMA, which needs none and moves by `update_target`."""

    def __init__(self, encoder: MultiCropEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.target = copy.deepcopy(encoder).requires_grad_(False)

    def update_target(self, momentum: float, skip: Tensor | None = None) -> None:
        """Move the target towards the student: target = momentum * target + (1 - momentum) * student.

        `skip`: `[] float32` on the device; 1 leaves the target unchanged. It is never read on the host, which would wait for
        the device.
        """
        move_average(self.target, self.encoder, momentum, skip)


@torch.no_grad()
def move_average(target: nn.Module, student: nn.Module, momentum: float, skip: Tensor | None) -> None:
    """Apply the equation of `StudentTeacher.update_target` to any two modules with the same parameters."""
    targets: list[Tensor] = list(target.parameters())
    students: list[Tensor] = list(student.parameters())
    keep = torch.full((), momentum, device=targets[0].device)
    if skip is not None:
        keep = torch.where(skip > 0, 1.0, keep)
    torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, list(torch._foreach_mul(students, 1 - keep)))
