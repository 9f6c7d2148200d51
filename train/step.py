"""One optimiser update: crops and masks in, weights and target moved."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.hjepa import HJEPA
from model.losses import random_directions
from model.masks import MultiCropMaskGenerator
from pipeline.batch import CropBatch
from train.distributed import Ranks, gradients_kept_back
from train.guard import StepGuard
from train.optim import ema_momentum, learning_rate
from train.state import RunState


@dataclass(frozen=True)
class LoopSettings:
    """Plain numbers of the loop. Steps count optimiser updates; learning rates are per update."""

    total_steps: int
    warmup_steps: int
    lr: float
    final_lr: float
    ema_momentum: float
    ema_final_momentum: float
    grad_clip: float | None
    use_amp: bool
    sigreg_slices: int
    projector_dim: int
    seed: int
    accumulation_steps: int
    log_frequency: int
    save_frequency: int
    probe_frequency: int
    save_probed: bool
    max_skipped_steps: int


@dataclass(frozen=True)
class Outcome:
    """What a step leaves to be logged. `losses`: one dict for each of its batches; `skip`: `[]`, 1.0 if it was left out."""

    losses: list[dict[str, torch.Tensor]]
    grad_norm: torch.Tensor
    skip: torch.Tensor
    lr: float
    momentum: float


def step_seed(seed: int, step: int, lane: int) -> int:
    """A seed of its own for every step and lane: a resumed run draws what an uninterrupted one would."""
    return ((seed * 1_000_003 + step) * 1_000_003 + lane) % 2**63


class Updater:
    """Takes steps. `replica` is what `replicated` makes of `model`."""

    def __init__(
        self,
        model: HJEPA,
        replica: torch.nn.Module,
        masks: MultiCropMaskGenerator,
        optimizer: torch.optim.Optimizer,
        guard: StepGuard,
        settings: LoopSettings,
        ranks: Ranks,
    ) -> None:
        self._model, self._replica, self._masks, self._optimizer = model, replica, masks, optimizer
        self._guard, self._settings, self._ranks = guard, settings, ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._generator = torch.Generator(masks.device)

    def take(self, stream: Iterator[CropBatch], state: RunState) -> Outcome:
        """Step `state.step`, with the next batches of `stream`. One that is not finite changes nothing."""
        settings, optimizer, step = self._settings, self._optimizer, state.step
        lr = learning_rate(step, settings.total_steps, settings.warmup_steps, settings.lr, settings.final_lr)
        momentum = ema_momentum(step, settings.total_steps, settings.ema_momentum, settings.ema_final_momentum)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = self._accumulate(stream, state)
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, settings.grad_clip or float("inf"))
        skip = self._guard.check([part["loss"] for part in losses], grad_norm)
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # the fused kernel leaves all as it is where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._model.update_target(momentum, skip)
        return Outcome(losses, grad_norm, skip, lr, momentum)

    def _accumulate(self, stream: Iterator[CropBatch], state: RunState) -> list[dict[str, torch.Tensor]]:
        """The losses of each of the step's batches; their mean gradient is left in the parameters."""
        settings, ranks, device = self._settings, self._ranks, self._masks.device
        # The directions must agree on all ranks.
        self._generator.manual_seed(step_seed(settings.seed, state.step, 0))
        directions = random_directions(settings.projector_dim, settings.sigreg_slices, self._generator, device)
        losses, parts = [], settings.accumulation_steps
        for part in range(parts):
            waiting = time.perf_counter()
            batch = next(stream)
            state.wait_s += time.perf_counter() - waiting
            # Masks and dropout draw from the global generator: by step, and by where the batch lies in the step.
            torch.manual_seed(step_seed(settings.seed, state.step, part * ranks.world_size + ranks.rank + 1))
            plan = self._masks(len(batch.labels))
            with (
                gradients_kept_back(self._replica, part < parts - 1),
                torch.autocast(device.type, torch.bfloat16, enabled=settings.use_amp),
            ):
                losses.append(self._replica(batch.crops, batch.boxes, batch.flips, plan, directions))
            (losses[-1]["loss"] / parts).backward()
            state.images += len(batch.labels) * ranks.world_size
        return losses
