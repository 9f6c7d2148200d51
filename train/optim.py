"""Parameter groups and schedules."""

import math
from dataclasses import dataclass

import torch
from torch import nn


def build_optimizer(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: no decay on norms, biases, scales and single tokens. `lr` is set each step.

    The groups hold the parameters' names, in the order of the model.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    kept: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # cls_token and reg_token are [1, n, D], a query is one token per level: embeddings, not weights of a map.
            is_map = parameter.ndim > 1 and not name.endswith(("cls_token", "reg_token", "query"))
            (decayed if is_map else kept).append((name, parameter))
    groups = [
        {"params": [parameter for _, parameter in part], "names": [name for name, _ in part], "weight_decay": decay}
        for part, decay in ((decayed, weight_decay), (kept, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Learning rate and EMA momentum of every optimiser step, counted from 0."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    final_lr: float
    first_momentum: float
    last_momentum: float

    def lr(self, step: int) -> float:
        """Linear warm-up to the peak, then half a cosine to `final_lr` at the last step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.total_steps - 1 - self.warmup_steps, 1)
        return cosine(self.peak_lr, self.final_lr, done)

    def momentum(self, step: int) -> float:
        """Half a cosine, held down to (1 + step) / (10 + step) so that short runs forget their start."""
        held = cosine(self.first_momentum, self.last_momentum, step / max(self.total_steps - 1, 1))
        return min(held, (1 + step) / (10 + step))


def cosine(start: float, end: float, done: float) -> float:
    """From `start` at done = 0 to `end` at done = 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
