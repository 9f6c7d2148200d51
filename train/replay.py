"""Reproduces the crops and masks that training sees at a position of an epoch."""

from dataclasses import dataclass
from typing import Any

import torch

from model.masks import MaskPlan
from pipeline.dataset import CropBatch, MultiCropDataset, resolve_device
from train.build import build_dataset, build_loader, build_masks, build_model, build_schedule
from train.config.schema import Config
from train.config.yaml12 import printable
from train.distributed import Ranks
from train.trainer import step_seed


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
    """Return the samples at `position .. position + count` of `epoch`, or fewer where their batch ends before.

    Raises ValueError for an epoch or a position that no step of the run reaches.
    """
    for option, value in (("--count", count), ("--world-size", world_size)):
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1")
    dataset, batch_size, parts = build_dataset(config), config.data.batch_size, config.training.accumulation_steps
    loader = build_loader(config, dataset, batch_size, Ranks(world_size=world_size))
    num_used = len(loader) // parts * parts * loader.global_batch
    check_position(epoch, position, config.training.epochs, num_used, len(dataset))
    # Each global batch is cut into one slice per rank.
    number, within = divmod(epoch * num_used + position, loader.global_batch)
    (step, part), (rank, image) = divmod(number, parts), divmod(within, batch_size)
    if step >= (num_steps := build_schedule(config, len(loader)).total_steps):
        raise ValueError(
            f"--epoch {epoch} --position {position}: step {step} is past the run's {num_steps} steps: choose an earlier "
            "position, or raise training.max_steps"
        )
    count = min(count, batch_size - image)
    # One batch from there: random draws depend on the position only, so the size of the batch does not matter.
    loader = build_loader(config, dataset, count)
    loader.load_state_dict({"epoch": epoch, "position": position})
    batch, rows = next(iter(loader)), loader.rows_at(epoch, position, position + count).tolist()
    with torch.device("meta"):  # only the sizes of the model matter: no weights are allocated
        model = build_model(config, torch.device("meta"))
    generator = build_masks(config, model, torch.device("cuda" if resolve_device(config.device) == "gpu" else "cpu"))
    torch.manual_seed(step_seed(config.seed, step, part * world_size + rank + 1))
    plan = generator(batch_size)  # masks are drawn for a complete batch, as in training

    def chosen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(chosen, value))
        return None if value is None else value[image : image + count]

    masks = MaskPlan(**{name: chosen(value) for name, value in vars(plan).items()})
    index = dataset.index
    captions = [
        f"epoch {epoch}, position {position + i}, step {step} (rank {rank}, image {image + i} of its batch): shard "
        f"{index.shards[index.samples[row]['shard']]}, {printable(index.name(row))}, label {index.samples[row]['label']}"
        for i, row in enumerate(rows)
    ]
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
