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

    def freeze(self, train_blocks: int) -> None:
        """Let only the student's last `train_blocks` blocks and its final norm learn."""
        self.encoder.requires_grad_(False)
        for module in (*self.encoder.vit.blocks[-train_blocks:], self.encoder.vit.norm):
            module.requires_grad_(True)


@torch.no_grad()
def move_average(target: nn.Module, student: nn.Module, momentum: float, skip: Tensor | None) -> None:
    """Apply the equation of `StudentTeacher.update_target` to two modules with the same parameters, where the student learns."""
    pairs = [pair for pair in zip(target.parameters(), student.parameters(), strict=True) if pair[1].requires_grad]
    targets: list[Tensor] = [pair[0] for pair in pairs]
    students: list[Tensor] = [pair[1] for pair in pairs]
    keep = torch.full((), momentum, device=targets[0].device)
    if skip is not None:
        keep = torch.where(skip > 0, 1.0, keep)
    torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, list(torch._foreach_mul(students, 1 - keep)))
