"""Reproduces the crops and masks that training sees at given positions of an epoch."""

from dataclasses import dataclass, fields
from functools import cache

import torch

from model.masks import MaskPlan, MultiCropMaskGenerator
from pipeline.dataset import CropBatch, MultiCropDataset, resolve_device
from train.build import build_dataset, build_loader, build_masks, build_model, build_schedule
from train.config.schema import Config
from train.config.yaml12 import printable
from train.distributed import Ranks
from train.trainer import step_seed


@dataclass(frozen=True)
class TrainingSlot:
    """Where training meets a sample: image `image` of batch `part` of a step, on a rank. All count from 0."""

    step: int
    part: int
    rank: int
    image: int


@dataclass(frozen=True)
class Replay:
    """B samples: their crops, their `masks`, their `rows` in the index, and a caption for each."""

    dataset: MultiCropDataset
    batch: CropBatch
    masks: MaskPlan
    rows: list[int]
    captions: list[str]
    grid: int
    strides: tuple[int, ...]


def replay(config: Config, epoch: int, position: int, count: int, world_size: int = 1) -> Replay:
    """Return the samples at `position .. position + count` of `epoch`, or fewer where training ends before.

    Raises ValueError for an epoch or a position that no step of the run reaches.
    """
    for option, value in (("--count", count), ("--world-size", world_size)):
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1")
    dataset, batch_size, parts = build_dataset(config), config.data.batch_size, config.training.accumulation_steps
    loader = build_loader(config, dataset, batch_size, Ranks(world_size=world_size))
    num_used = len(loader) // parts * parts * loader.global_batch
    check_position(epoch, position, config.training.epochs, num_used, len(dataset))
    positions = range(position, min(position + count, num_used))
    slots = [slot_of(epoch * num_used + p, batch_size, parts, world_size) for p in positions]
    num_steps = build_schedule(config, len(loader)).total_steps
    if slots[0].step >= num_steps:
        raise ValueError(
            f"--epoch {epoch} --position {position}: step {slots[0].step} is past the run's {num_steps} steps: "
            "choose an earlier position, or raise training.max_steps"
        )
    slots = [slot for slot in slots if slot.step < num_steps]
    with torch.device("meta"):  # only the sizes of the model matter: no weights are allocated
        model = build_model(config, torch.device("meta"))
    device = torch.device("cuda" if resolve_device(config.device) == "gpu" else "cpu")
    generator = build_masks(config, model, device)
    # One batch from there: random draws depend on the position only, so the size of the batch does not matter.
    loader = build_loader(config, dataset, len(slots))
    loader.load_state_dict({"epoch": epoch, "position": position})
    batch = next(iter(loader))
    rows = loader.rows_at(epoch, position, position + len(slots)).tolist()
    captions = [describe(dataset, row, epoch, position + i, slots[i]) for i, row in enumerate(rows)]
    masks = masks_of(slots, generator, config.seed, batch_size, world_size)
    return Replay(dataset, batch, masks, rows, captions, model.grid, generator.strides)


def check_position(epoch: int, position: int, epochs: int, num_used: int, total: int) -> None:
    """Raise ValueError unless the epoch exists and the position is one of the `num_used` that fill its steps."""
    if not 0 <= epoch < epochs:
        raise ValueError(f"--epoch {epoch}: the run has {epochs} epochs, allowed are 0..{epochs - 1}")
    if not 0 <= position < num_used:
        dropped = f" (the last {total - num_used} fill no step and are dropped)" if num_used <= position < total else ""
        raise ValueError(
            f"--position {position}: an epoch trains on {num_used:,} of {total:,} samples, allowed are 0..{num_used - 1}{dropped}"
        )


def slot_of(number: int, batch_size: int, parts: int, world_size: int) -> TrainingSlot:
    """Return the slot of the sample of that number in a run: each global batch is cut into one slice per rank."""
    batch, within = divmod(number, batch_size * world_size)
    return TrainingSlot(*divmod(batch, parts), *divmod(within, batch_size))


def masks_of(
    slots: list[TrainingSlot], generator: MultiCropMaskGenerator, seed: int, batch_size: int, world_size: int
) -> MaskPlan:
    """Return the masks of each slot. They are drawn for its complete batch, as in training."""

    @cache
    def plan_of(step: int, lane: int) -> MaskPlan:
        torch.manual_seed(step_seed(seed, step, lane))
        return generator(batch_size)

    chosen = [(plan_of(slot.step, slot.part * world_size + slot.rank + 1), slot.image) for slot in slots]

    def stacked(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Join the slots' rows of one tensor of each plan; None where the strategy has no such tensor."""
        rows = [tensor[image] for tensor, (_, image) in zip(tensors, chosen, strict=True) if tensor is not None]
        return torch.stack(rows) if rows else None

    names = [field.name for field in fields(MaskPlan) if field.name != "queries"]
    tensors = {name: stacked([getattr(plan, name) for plan, _ in chosen]) for name in names}
    levels = zip(*(plan.queries for plan, _ in chosen), strict=True)
    return MaskPlan(queries=tuple(stacked(list(level)) for level in levels), **tensors)  # type: ignore[arg-type,misc]


def describe(dataset: MultiCropDataset, row: int, epoch: int, position: int, slot: TrainingSlot) -> str:
    index, sample = dataset.index, dataset.index.samples[row]
    return (
        f"epoch {epoch}, position {position}, step {slot.step} (rank {slot.rank}, image {slot.image} of its batch): "
        f"shard {index.shards[sample['shard']]}, {printable(index.name(row))}, label {sample['label']}"
    )
