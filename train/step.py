"""One optimiser update: crops and masks in, weights and target moved."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model.hjepa import HJEPA
from model.losses import random_directions
from model.masks import MaskPlan, MultiCropMaskGenerator
from model.teacher import TaughtEncoder
from pipeline.batch import CropBatch
from pipeline.loader import MultiCropLoader
from train.build import amp_enabled, build_masks, build_model, crop_sizes
from train.config.schema import Config
from train.distributed import Ranks, gradients_kept_back
from train.monitor import StepGuard
from train.optim import Schedule
from train.state import RunState


@dataclass(frozen=True)
class StepResult:
    """What can be logged of a step. `losses`: one dict for each of its batches; `skip`: `[]`, 1.0 if it was skipped."""

    losses: list[dict[str, torch.Tensor]]
    grad_norm: torch.Tensor
    skip: torch.Tensor
    lr: float
    momentum: float


def step_seed(seed: int, step: int, lane: int) -> int:
    """A seed of its own for every step and lane, so that a resumed run draws what an uninterrupted one would."""
    return ((seed * 1_000_003 + step) * 1_000_003 + lane) % 2**63


def batches(loader: MultiCropLoader, per_step: int = 1) -> Iterator[CropBatch]:
    """Epoch after epoch, from where the loader stands. The last batches of an epoch that do not fill a step are dropped."""
    while True:
        left = (len(loader.index) - loader.state_dict()["position"]) // loader.global_batch
        usable = left // per_step * per_step
        for number, batch in enumerate(loader):
            if number < usable:
                yield batch


class Updater:
    """Takes optimiser steps. `replica` is what `replicated` makes of `model`."""

    def __init__(
        self,
        config: Config,
        model: TaughtEncoder,
        replica: torch.nn.Module,
        masks: MultiCropMaskGenerator,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        ranks: Ranks,
    ) -> None:
        self._config, self._model, self._replica, self._masks = config, model, replica, masks
        self._optimizer, self._schedule, self._ranks = optimizer, schedule, ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._generator = torch.Generator(masks.device)

    def take(self, stream: Iterator[CropBatch], state: RunState, guard: StepGuard) -> StepResult:
        """Step `state.step`, with the next batches of `stream`. A step that is not finite changes nothing."""
        lr, momentum = self._schedule.lr(state.step), self._schedule.momentum(state.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        losses = self._accumulate(stream, state)
        most = self._config.training.grad_clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, most)
        skip = guard.check([part["loss"] for part in losses], grad_norm)
        self._optimizer.found_inf = skip  # type: ignore[attr-defined]  # where it is 1, the fused kernel changes nothing
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._model.update_target(momentum, skip)
        return StepResult(losses, grad_norm, skip, lr, momentum)

    def _accumulate(self, stream: Iterator[CropBatch], state: RunState) -> list[dict[str, torch.Tensor]]:
        """The losses of each of the step's batches; their mean gradient is left in the parameters."""
        config, ranks, device = self._config, self._ranks, self._masks.device
        # The directions must agree on all ranks.
        self._generator.manual_seed(step_seed(config.seed, state.step, 0))
        shape = (config.model.projector_dim, config.loss.sigreg_slices)
        directions = random_directions(*shape, self._generator, device)
        losses, parts = [], config.training.accumulation_steps
        for part in range(parts):
            waiting = time.perf_counter()
            batch = next(stream)
            state.wait_s += time.perf_counter() - waiting
            # Masks and dropout draw from the global generator: by step, and by the batch's place in the step.
            torch.manual_seed(step_seed(config.seed, state.step, part * ranks.world_size + ranks.rank + 1))
            plan = self._masks(len(batch.labels))
            with (
                gradients_kept_back(self._replica, part < parts - 1),
                torch.autocast(device.type, torch.bfloat16, enabled=amp_enabled(config, device)),
            ):
                losses.append(self._losses(batch, plan, directions))
            (losses[-1]["loss"] / parts).backward()
            state.images += len(batch.labels) * ranks.world_size
        return losses

    def _losses(self, batch: CropBatch, plan: MaskPlan, directions: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._replica(batch.crops, batch.boxes, batch.flips, plan, directions)


def noise_inputs(
    config: Config, count: int, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `HJEPA.forward` takes for `count` images besides masks: crops of noise, boxes, flips and directions."""
    sizes = crop_sizes(config)
    crops = [torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device) for size in sizes]
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(count, len(sizes), 4)
    flips = torch.zeros(count, len(sizes), dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (config.model.projector_dim, config.loss.sigreg_slices)
    return crops, boxes, flips, random_directions(*shape, generator, device)


def trial_step(config: Config, device: torch.device) -> tuple[HJEPA, Callable[[], None]]:
    """The model of `config`, and a call that computes loss and gradients of one batch of noise and waits for the device."""
    count, model = config.data.batch_size, build_model(config, device)
    masks = build_masks(config, model, device)
    crops, boxes, flips, directions = noise_inputs(config, count, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp_enabled(config, device)):
            loss = model(crops, boxes, flips, masks(count), directions)["loss"]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return model, step
