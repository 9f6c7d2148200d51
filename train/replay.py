"""The crops and masks that training sees at given positions of an epoch, reproduced."""

from dataclasses import dataclass, fields

import torch

from model.masks import MaskPlan, MultiCropMaskGenerator
from pipeline.batch import CropBatch
from pipeline.dataset import MultiCropDataset, resolve_device
from train.build import build_dataset, build_loader, build_masks, build_model, build_schedule
from train.config.schema import Config
from train.trainer import step_seed


@dataclass(frozen=True)
class Place:
    """Where training meets a sample: steps counted from 0, `part` the batch of an accumulated step, `slot` the place in it."""

    step: int
    part: int
    rank: int
    slot: int


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
    """The samples at `position .. position + count` of `epoch`, or up to the last one that the epoch trains on.

    Raises ValueError for an epoch or a position that no step of the run reaches.
    """
    for option, value in (("--count", count), ("--world-size", world_size)):
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1")
    dataset = build_dataset(config)
    device = torch.device("cuda" if resolve_device(config.device) == "gpu" else "cpu")
    # Only the sizes of the model are needed: no weights are allocated.
    with torch.device("meta"):
        model = build_model(config, torch.device("meta"))
    generator = build_masks(config, model, device)
    loader = build_loader(config, dataset, config.data.batch_size, world_size=world_size)
    parts, total_steps = config.training.accumulation_steps, build_schedule(config, len(loader)).total_steps
    used = len(loader) // parts * parts * loader.global_batch
    check_place(epoch, position, config.training.epochs, used, len(dataset))
    count = min(count, used - position)
    places = [
        place_of(epoch, p, used, config.data.batch_size, parts, world_size) for p in range(position, position + count)
    ]
    first, places = places[0], [place for place in places if place.step < total_steps]
    if not places:
        raise ValueError(
            f"--epoch {epoch} --position {position}: step {first.step} is past the run's {total_steps} steps: "
            "choose an earlier place, or raise training.max_steps"
        )
    batch, rows = crops_at(config, dataset, epoch, position, len(places))
    return Replay(
        dataset,
        batch,
        masks_at(places, generator, config.seed, config.data.batch_size, world_size),
        rows,
        [describe(dataset, row, epoch, position + i, places[i]) for i, row in enumerate(rows)],
        model.grid,
        generator.strides,
    )


def check_place(epoch: int, position: int, epochs: int, used: int, total: int) -> None:
    """Raise ValueError unless the position is one of the `used` that an epoch's whole steps hold."""
    if not 0 <= epoch < epochs:
        raise ValueError(f"--epoch {epoch}: the run has {epochs} epochs, allowed are 0..{epochs - 1}")
    if not 0 <= position < used:
        left_out = f" (the last {total - used} fill no step and are dropped)" if used <= position < total else ""
        raise ValueError(
            f"--position {position}: an epoch trains on {used:,} of {total:,} samples, "
            f"allowed are 0..{used - 1}{left_out}"
        )


def place_of(epoch: int, position: int, used: int, batch_size: int, parts: int, world_size: int) -> Place:
    """Global batch k of an epoch holds positions `k * G .. (k + 1) * G`, cut into one slice for each rank."""
    batch, within = divmod(epoch * used + position, batch_size * world_size)
    return Place(*divmod(batch, parts), *divmod(within, batch_size))


def crops_at(
    config: Config, dataset: MultiCropDataset, epoch: int, position: int, count: int
) -> tuple[CropBatch, list[int]]:
    """One batch from there on and its rows: draws depend on the position alone, so the batch's size does not matter."""
    loader = build_loader(config, dataset, count)
    loader.load_state_dict({"epoch": epoch, "position": position})
    batch = next(iter(loader))
    return batch, loader.rows_at(epoch, position, position + count).tolist()


def masks_at(
    places: list[Place], generator: MultiCropMaskGenerator, seed: int, batch_size: int, world_size: int
) -> MaskPlan:
    """The masks of each place: drawn for its whole batch at once, as in training, of which its slot is taken."""
    plans: dict[tuple[int, int], MaskPlan] = {}
    for place in places:
        drawn = place.step, place.part * world_size + place.rank + 1
        if drawn not in plans:
            torch.manual_seed(step_seed(seed, *drawn))
            plans[drawn] = generator(batch_size)
    chosen = [(plans[place.step, place.part * world_size + place.rank + 1], place.slot) for place in places]

    def stacked(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        """The slots' rows of one tensor of each plan; None where the strategy has no such tensor."""
        rows = [tensor[slot] for tensor, (_, slot) in zip(tensors, chosen, strict=True) if tensor is not None]
        return torch.stack(rows) if rows else None

    parts = {
        f.name: stacked([getattr(plan, f.name) for plan, _ in chosen]) for f in fields(MaskPlan) if f.name != "queries"
    }
    levels = zip(*(plan.queries for plan, _ in chosen), strict=True)
    return MaskPlan(queries=tuple(stacked(list(level)) for level in levels), **parts)  # type: ignore[arg-type,misc]


def describe(dataset: MultiCropDataset, row: int, epoch: int, position: int, place: Place) -> str:
    index = dataset.index
    sample = index.samples[row]
    return (
        f"epoch {epoch}, position {position}, step {place.step} (rank {place.rank}, image {place.slot} of its batch): "
        f"shard {index.shards[sample['shard']]}, member {index.key(row)}, label {sample['label']}"
    )
