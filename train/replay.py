"""Takes a step of a run again: its images, crops and masks, and the losses of each image."""

import logging
import math
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from model.hjepa import HJEPA
from model.losses import BatchStandardize, Whiten
from model.masks import MaskPlan
from pipeline.dataset import CropBatch, MultiCropDataset, Normalization, resolve_device
from pipeline.text import Every, printable
from train.build import amp_enabled
from train.checkpoint import checkpoint_step, is_sound, list_checkpoints, read_state
from train.config.schema import Config
from train.output.folder import run_folder
from train.trainer import Trainer, batches

PROGRESS_EVERY_S = 5.0
Losses = dict[str, float]

log = logging.getLogger(__name__)


class ReplayedImage(NamedTuple):
    """An image of a step: crops, normalised, and masks as those of a batch of one, its row in the index, and its losses.

    `score` is the weighted sum of the losses that an image has, all but SIGReg; infinite if it is not finite.
    """

    batch: CropBatch
    masks: MaskPlan
    row: int
    caption: str
    losses: Losses
    score: float


class Replay(NamedTuple):
    """A step taken again; `losses` and those of its images are empty if they were not computed.

    `weights_step`: after so many steps, the weights were as they are here.
    """

    dataset: MultiCropDataset
    images: list[ReplayedImage]
    losses: Losses
    weights_step: int
    grid: int
    strides: tuple[int, ...]


def replay_step(config: Config, step: int, *, with_losses: bool, exact: bool = False, world_size: int | None = None) -> Replay:
    """Take `step`, counted from 1, again, in one process and without writing anything.

    Losses need the run in `run_folder(config)`: the weights are those of its last checkpoint before the step; with `exact`, the
    steps between are taken again. `world_size`: ranks of the run; None: as many as its newest checkpoint implies, or one.
    Nothing is dropped by stochastic depth. Raises ValueError for a step that the run does not have.
    """
    checkpoints = list_checkpoints(run_folder(config) / "checkpoints") if with_losses else []
    before = [path for path in checkpoints if checkpoint_step(path) < step and is_sound(path)]
    batch_size, parts = config.data.batch_size, config.training.accumulation_steps
    if world_size is None:
        run = read_state(checkpoints[-1]).get("run", {}) if checkpoints else {}
        world_size = max(1, round(run.get("images", 0) / max(run.get("step", 1), 1) / (batch_size * parts)))
    changes: dict[str, Any] = {"batch_size": batch_size * world_size}
    if resolve_device(config.device) == "cpu":
        changes["crop_device"] = "auto"  # the run may have made its crops on a GPU
    data = config.data.model_copy(update=changes)
    training = config.training.model_copy(update={"compile": False})
    model = config.model if with_losses else config.model.model_copy(update={"weights": None})
    trainer = Trainer(config.model_copy(update={"data": data, "training": training, "model": model}))
    if not 1 <= step <= trainer.schedule.total_steps:
        raise ValueError(f"--step {step}: the run has {trainer.schedule.total_steps:,} steps, counted from 1")
    if before:
        trainer.restore(before[-1])
    progress = Every(PROGRESS_EVERY_S)
    while exact and trainer.state.step < step - 1:
        trainer.train_step()
        if progress.due():
            log.info(f"step {trainer.state.step:,} of {step - 1:,} taken again ...")
    weights_step, trainer.state.step = trainer.state.step, step - 1
    trainer.loader.load_state_dict(position_after(trainer, step - 1 - weights_step))
    losses, images = take(trainer, with_losses)
    return Replay(trainer.dataset, images, losses, weights_step, trainer.masks.grid, trainer.masks.strides)


def position_after(trainer: Trainer, steps: int) -> dict[str, int]:
    """Return the loader's state after so many more steps."""
    loader, state = trainer.loader, trainer.loader.state_dict()
    per_step = loader.global_batch * trainer.config.training.accumulation_steps
    epoch, position, left = state["epoch"], state["position"], (len(loader.index) - state["position"]) // per_step
    if steps >= left:
        epochs, steps = divmod(steps - left, trainer.steps_per_epoch)
        epoch, position = epoch + 1 + epochs, 0
    return {"epoch": epoch, "position": position + steps * per_step}


def take(trainer: Trainer, with_losses: bool) -> tuple[Losses, list[ReplayedImage]]:
    """Return the losses of the trainer's next step, and its images."""
    model, loader, config = cast(HJEPA, trainer.model.eval()), trainer.loader, trainer.config
    (directions, plan), index, images = trainer.draw(), loader.index, list[ReplayedImage]()
    normalize, wholes = Normalization(trainer.dataset.mean, trainer.dataset.std), list[Losses]()
    for part, batch in enumerate(islice(batches(loader), config.training.accumulation_steps)):
        masks = plan.images(slice(part * loader.global_batch, (part + 1) * loader.global_batch))
        epoch, first = loader.state_dict()["epoch"], int(batch.positions[0])
        rows = loader.rows_at(epoch, first, first + len(batch.labels)).tolist()
        each: list[Losses] = [{} for _ in rows]
        if with_losses:
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=amp_enabled(config, trainer.device)):
                whole, each = image_losses(model, batch, masks, directions)
            wholes.append(whole)
        for i, (row, losses) in enumerate(zip(rows, each, strict=True)):
            score, one = losses.pop("loss", 0.0) - model.weights.sigreg * losses.pop("sigreg", 0.0), slice(i, i + 1)
            crops = [normalize(crop[one]) for crop in batch.crops]
            seen = CropBatch(crops, batch.labels[one], batch.boxes[one], batch.flips[one], batch.positions[one])
            shard, label = (index.samples[row][field] for field in ("shard", "label"))
            caption = (
                f"epoch {epoch}, position {first + i}: shard {index.shards[shard]}, {printable(index.name(row))}, label {label}"
            )
            score = score if math.isfinite(score) else math.inf
            images.append(ReplayedImage(seen, masks.images(one), row, caption, losses, score))
    return {name: sum(whole[name] for whole in wholes) / len(wholes) for name in (wholes or [{}])[0]}, images


@torch.no_grad()
def image_losses(model: HJEPA, batch: CropBatch, masks: MaskPlan, directions: torch.Tensor) -> tuple[Losses, list[Losses]]:
    """Return the losses of a batch, and of each image alone, with the statistics of the batch for projections and targets."""
    statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def as_in_the_batch(module: BatchStandardize | Whiten, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if module in statistics:
            return module.forward(inputs[0], statistics[module])
        statistics[module] = module.statistics(inputs[0])
        return output

    def losses_of(images: slice) -> Losses:
        crops = [crop[images] for crop in batch.crops]
        losses = model(crops, batch.boxes[images], batch.flips[images], masks.images(images), directions)
        return {name: float(value) for name, value in losses.items() if value.dim() == 0}

    hooks = [m.register_forward_hook(as_in_the_batch) for m in model.modules() if isinstance(m, BatchStandardize | Whiten)]
    try:
        return losses_of(slice(None)), [losses_of(slice(i, i + 1)) for i in range(len(batch.labels))]
    finally:
        for hook in hooks:
            hook.remove()
