"""AdamW, Muon, their parameter groups, and the schedules."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

# Muon as published (kellerjordan.github.io/posts/muon): momentum, Newton-Schulz steps, and the coefficients of their quintic,
# chosen for the steepest slope at 0 that keeps singular values near 1.
MUON_MOMENTUM, MUON_STEPS, MUON_EPS = 0.95, 5, 1e-7
MUON_A, MUON_B, MUON_C = 3.4445, -4.7750, 2.0315
MUON_SCALE = 0.2  # root mean square of an update, as is usual for AdamW's (arXiv 2502.16982, section 2.2)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the groups with `muon`: the momentum's matrix with its singular values brought near 1.

    Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the update, Liu et al. 2025 (arXiv 2502.16982) for its
    scale, with which AdamW's learning rate and weight decay also serve Muon. `torch.optim.Muon` computes in bfloat16, which
    is slow on a CPU, takes one matrix after the other, and knows no `found_inf`.
    """

    found_inf: torch.Tensor | None = None
    """`[]`, set before a step: where it is 1, the step changes nothing, as in the fused AdamW."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group, those of equal shape, transposed or not, in one batch."""
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[min(parameter.shape), max(parameter.shape)].append(parameter)
        for parameters in by_shape.values():
            updates = orthogonalized(torch.stack([_wide(self._direction(parameter)) for parameter in parameters]))
            scale = group["lr"] * MUON_SCALE * max(updates.shape[1:]) ** 0.5
            decay = group["lr"] * group["weight_decay"]
            for parameter, update in zip(parameters, updates, strict=True):
                update = update if parameter.shape[0] <= parameter.shape[1] else update.T
                change = scale * update + decay * parameter
                if self.found_inf is not None:
                    change = change * (1 - self.found_inf)
                parameter.sub_(change)

    def _direction(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return Nesterov's momentum, finite also for a gradient that is not, as the step is then skipped."""
        state, gradient = self.state[parameter], cast(torch.Tensor, parameter.grad)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, momentum, gradient)
        momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
        return gradient.lerp(momentum, MUON_MOMENTUM)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix, transposed if it is higher than wide: the smaller Gram matrix is cheaper."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Return `[n, a, b]` matrices, a <= b, with their singular vectors and all singular values between about 0.7 and 1.2.

    Takes Newton-Schulz steps with Jordan's coefficients, in bfloat16 on a GPU and in float32 on a CPU.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + MUON_EPS)  # the Frobenius norm bounds the largest singular value
    for _ in range(MUON_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=MUON_B, alpha=MUON_C), x, beta=MUON_A)
    return x.to(matrices.dtype)


def build_optimizer(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], name: str = "adamw", layer_decay: float = 1.0
) -> MuonAdamW:
    """Group the trainable parameters: no weight decay on norms, biases, scales and single tokens.

    `name`: `adamw`, or `muon` for Muon on the weights of the blocks' linear layers and AdamW on all others. The groups hold
    the parameters' `names`, in the order of the model, and `lr_scale`. Each step sets `lr`, times that scale.
    """
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    depth = 1 + max((block_number(key) for key, _ in model.named_parameters()), default=-1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            # cls_token and reg_token are [1, n, D], a query is one token per level: embeddings, not weights of a map.
            is_map = parameter.ndim > 1 and not key.endswith(("cls_token", "reg_token", "query"))
            is_hidden = name == "muon" and parameter.ndim == 2 and "blocks." in key
            scale = layer_scale(key, depth, layer_decay)
            options = {"weight_decay": weight_decay if is_map else 0.0, "muon": is_hidden, "lr_scale": scale}
            group = groups.setdefault((is_hidden, is_map, scale), {"params": [], "names": [], **options})
            group["params"].append(parameter)
            group["names"].append(key)
    return MuonAdamW(list(groups.values()), lr=0.0, betas=betas, fused=True)


def block_number(key: str) -> int:
    """Return the number of the encoder's block that a parameter is in, -1 outside the blocks."""
    found = re.match(r"encoder\.vit\.blocks\.(\d+)\.", key)
    return int(found[1]) if found else -1


def layer_scale(key: str, depth: int, decay: float) -> float:
    """Return the factor of a parameter's learning rate: `decay` for the last of `depth` blocks, once more for each earlier one.

    The embeddings come before the first block. Norm and heads, which come after the last, have 1 (BEiT, arXiv 2106.08254).
    """
    is_behind = not key.startswith("encoder.vit.") or key.startswith(("encoder.vit.norm.", "encoder.vit.fc_norm."))
    return 1.0 if is_behind else decay ** (depth - block_number(key))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and EMA momentum of every optimiser step, counted from 0."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    final_lr: float
    first_momentum: float
    last_momentum: float
    heads_steps: int = 0
    from_weights: bool = False

    def lr(self, step: int) -> float:
        """Return the rate of a linear warm-up to the peak, then of half a cosine to `final_lr` at the last step.

        In the `heads_steps` before, of the heads alone, it stays at the peak, and the encoder has a warm-up of its own.
        """
        if step < self.heads_steps:
            return self.peak_lr
        step, last = step - self.heads_steps, self.total_steps - 1 - self.heads_steps
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(last - self.warmup_steps, 1)
        return cosine(self.peak_lr, self.final_lr, done)

    def momentum(self, step: int) -> float:
        """Return half a cosine, capped at (1 + step) / (10 + step) so that short runs forget random weights, but no others."""
        scheduled = cosine(self.first_momentum, self.last_momentum, step / max(self.total_steps - 1, 1))
        return scheduled if self.from_weights else min(scheduled, (1 + step) / (10 + step))


def cosine(start: float, end: float, done: float) -> float:
    """Return the point at `done`, 0..1, of half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
