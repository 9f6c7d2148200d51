"""Builds the objects of a run from its config: the one place where config keys meet arguments."""

import logging
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, Level, default_levels
from model.losses import LossWeights
from model.masks import MultiCropMaskGenerator
from model.predictor import Predictor
from model.teacher import StudentTeacher
from pipeline.crops.augment import Augmentation, ViewRecipe
from pipeline.crops.device import DeviceError, choose_crop_device
from pipeline.crops.graph import CROP_DEVICES
from pipeline.dataset import (
    MultiCropDataset,
    build_multicrop_dataset,
    centre_crop_dataset,
    default_threads,
    own_cores,
    resolve_device,
)
from pipeline.loader import MultiCropLoader, build_multicrop_dataloader
from pipeline.shards.index import ShardIndex, open_index, split_folder
from train.config.schema import Config
from train.distributed import SINGLE_PROCESS, Ranks
from train.evaluation.features import check_classes, subsample_evenly
from train.optim import Schedule

log = logging.getLogger(__name__)

# On two cores DALI's thread mostly waits. With two threads, an encoder 128 wide trains faster, and one 64 wide slower.
MIN_WIDTH_FOR_TWO_THREADS = 128


def torch_threads(config: Config) -> int:
    """Return torch's threads next to DALI on a CPU: the cores that DALI leaves, but two for a wide encoder on two cores."""
    width = config.model.encoder_kwargs.get("embed_dim")
    is_narrow = isinstance(width, int) and width < MIN_WIDTH_FOR_TWO_THREADS
    return min(own_cores(), max(own_cores() - default_threads(), 1 if is_narrow else 2))


def amp_enabled(config: Config, device: torch.device) -> bool:
    """Return True where steps run in bf16: on GPUs. CPUs are slower with it than in float32."""
    return config.training.use_amp and device.type == "cuda"


def crop_sizes(config: Config) -> list[int]:
    """Return the pixels per side of each crop of an image, globals first."""
    (num_global, num_local), crops = config.data.crop_counts, config.data.multicrop
    return [crops.global_crop_size] * num_global + [crops.local_crop_size] * num_local


def build_dataset(config: Config) -> MultiCropDataset:
    data, (num_global, num_local) = config.data, config.data.crop_counts
    crops = data.multicrop.model_dump() | {"num_global_crops": num_global, "num_local_crops": num_local}
    augmentation = Augmentation(**data.augmentation.model_dump())
    return build_multicrop_dataset(data.dataset, data.data_path, augmentation=augmentation, **crops)


def build_loader(
    config: Config, dataset: MultiCropDataset, batch_size: int, ranks: Ranks = SINGLE_PROCESS, **options: Any
) -> MultiCropLoader:
    """Build a loader with the run's device, seed and threads; `options` are more arguments of `build_multicrop_dataloader`."""
    data = config.data
    return build_multicrop_dataloader(
        dataset, batch_size, seed=config.seed, device=config.device, device_id=ranks.local_rank, crop_device=data.crop_device,
        num_workers=data.num_workers, prefetch=data.prefetch, max_bad_share=data.max_bad_share, retry_s=data.store_retry_s,
        rank=ranks.rank, world_size=ranks.world_size, **options,
    )  # fmt: skip


def build_training_loader(
    config: Config, dataset: MultiCropDataset, ranks: Ranks = SINGLE_PROCESS, **changes: Any
) -> MultiCropLoader:
    """Build a loader of uint8 crops, which the model normalises. Raises ValueError for fewer samples than one step needs."""
    loader = build_loader(config, dataset, config.data.batch_size, ranks, normalized=False, **changes)
    needed = loader.global_batch * config.training.accumulation_steps
    if len(dataset) < needed:
        raise ValueError(
            f"{dataset.index.folder}: {len(dataset)} samples are fewer than one step of {needed} (batch_size "
            f"{config.data.batch_size} x {ranks.world_size} ranks x {config.training.accumulation_steps} accumulation "
            "steps). Lower data.batch_size or training.accumulation_steps"
        )
    return loader


def with_crop_device(config: Config, ranks: Ranks = SINGLE_PROCESS, kept: str | None = None) -> Config:
    """Return `config` with data.crop_device decided for a GPU run: if it is auto, `kept`, or the best that works on every rank.

    `kept`: where the run that continues has made its crops; any other way makes other pixels. Raises DeviceError if that, or
    what is asked for, is the kernel, and it does not work on this rank.
    """
    if resolve_device(config.device) != "gpu":
        return config
    chosen = kept if config.data.crop_device == "auto" else config.data.crop_device
    if chosen not in ("dali", "cpu"):
        mine, reason = choose_crop_device(tuple(crop_sizes(config)), ranks.local_rank)
        if chosen == "gpu" and reason:
            raise DeviceError(f"data.crop_device: gpu: {reason}. data.crop_device={mine} works, with slightly other pixels")
        if reason:
            log.warning(reason)
        # The list begins with the best, so the first entry that no rank falls behind is the best for all.
        chosen = next(way for n, way in enumerate(CROP_DEVICES) if ranks.all(mine in CROP_DEVICES[: n + 1]))
    return config.model_copy(update={"data": config.data.model_copy(update={"crop_device": chosen})})


def build_evaluation_loaders(config: Config) -> tuple[MultiCropLoader, MultiCropLoader]:
    """Build loaders of centre crops in stored order: of the training split and of the validation split.

    Each has at most `evaluation.max_samples` images. Raises FileNotFoundError when a split is missing, and ValueError when
    their labels mean different classes.
    """
    folders = [split_folder(config.data.dataset, config.data.data_path, split) for split in ("train", "val")]
    if folders[0] == folders[1]:
        raise FileNotFoundError(f"{folders[0]}: a single split; evaluation needs train/ and val/ in it")
    indices = [subsample_evenly(open_index(folder), config.evaluation.max_samples) for folder in folders]
    check_classes(*indices)
    size, pixels = config.data.multicrop.global_crop_size, config.data.augmentation
    train, val = (centre_crop_dataset(index, size, config.evaluation.crop_ratio, pixels.mean, pixels.std) for index in indices)
    return _in_stored_order(config, train), _in_stored_order(config, val)


def _in_stored_order(config: Config, dataset: MultiCropDataset, **options: Any) -> MultiCropLoader:
    return build_loader(config, dataset, config.evaluation.batch_size, shuffle=False, drop_last=False, **options)


def build_pair_loader(config: Config, index: ShardIndex) -> MultiCropLoader:
    """Build a loader, in stored order, of two uint8 global crops of each image: boxes and mirroring as in training, colours kept.

    Their seed is always 0, so that every run gets the same crops.
    """
    crops, pixels = config.data.multicrop, config.data.augmentation
    recipe = ViewRecipe(crops.global_crop_size, crops.global_crop_scale, flip_prob=pixels.flip_prob)
    dataset = MultiCropDataset(index, (recipe, recipe), pixels.mean, pixels.std)
    return _in_stored_order(config.model_copy(update={"seed": 0}), dataset, normalized=False)


def build_encoder(config: Config) -> MultiCropEncoder:
    """Build the encoder with its seeded initial weights."""
    torch.manual_seed(config.seed)
    model, pixels = config.model, config.data.augmentation
    return MultiCropEncoder(model.encoder, crop_sizes(config), mean=pixels.mean, std=pixels.std, **model.encoder_kwargs)


def build_model(config: Config, device: torch.device) -> HJEPA:
    """Build the model with its seeded initial weights."""
    settings, loss, encoder = config.model, config.loss, build_encoder(config)
    levels = build_levels(config, encoder.depth)
    predictor = None
    if loss.prediction_weight > 0:
        shape = (settings.predictor_width, settings.predictor_depth, settings.predictor_heads)
        predictor = Predictor(encoder.width, *shape, len(levels))
    weights = LossWeights(
        loss.prediction_weight, loss.summary_weight, loss.view_weight, loss.sigreg_weight, loss.anchor_weight,
        loss.colour_weight,
    )  # fmt: skip
    return HJEPA(
        encoder, predictor, levels, num_global_crops=config.data.crop_counts[0],
        global_crop_size=config.data.multicrop.global_crop_size, projector_hidden=settings.projector_hidden,
        projector_dim=settings.projector_dim, weights=weights, grad_checkpointing=settings.grad_checkpointing,
        whiten_targets=loss.whiten_targets,
    ).to(device)  # fmt: skip


def build_levels(config: Config, depth: int) -> tuple[Level, ...]:
    """Return the configured levels, layers counted from 0. Raises ValueError for a layer that the encoder does not have."""
    if config.model.levels is None:
        return default_levels(depth)
    levels = []
    for number, level in enumerate(config.model.levels):
        if not -depth <= level.layer < depth:
            raise ValueError(
                f"model.levels.{number}.layer: {level.layer}, but the encoder has {depth} blocks: allowed are "
                f"0..{depth - 1}, or -{depth}..-1 from the end"
            )
        levels.append(Level(level.layer % depth, level.stride, level.weight))
    return tuple(levels)


def build_masks(config: Config, model: StudentTeacher, device: torch.device) -> MultiCropMaskGenerator:
    """Build the generator of masks for any model with the config's encoder."""
    crops, patch = config.data.multicrop, model.encoder.patch_size
    levels = build_levels(config, model.encoder.depth) if config.loss.prediction_weight > 0 else ()
    return MultiCropMaskGenerator(
        config.masking.strategy, *config.data.crop_counts, grid=crops.global_crop_size // patch,
        local_grid=crops.local_crop_size // patch, strides=tuple(level.stride for level in levels), device=device,
        **config.masking.model_dump(exclude={"strategy"}),
    )  # fmt: skip


def build_schedule(config: Config, batches_per_epoch: int) -> Schedule:
    """Raises ValueError for a warm-up that is longer than `training.max_steps`."""
    training, steps_per_epoch = config.training, batches_per_epoch // config.training.accumulation_steps
    total, warmup_steps = training.epochs * steps_per_epoch, round(training.warmup_epochs * steps_per_epoch)
    total_steps = min(max(total, training.min_steps), training.max_steps or max(total, training.min_steps))
    heads_steps = round(training.heads_first_ratio * total_steps)
    if warmup_steps > total_steps - heads_steps:
        heads = f" less {heads_steps:,} of the heads alone" if heads_steps else ""
        raise ValueError(
            f"training.warmup_epochs: {training.warmup_epochs:g} epochs are {warmup_steps:,} steps here, more than max_steps = "
            f"{total_steps:,}{heads}, so lr would never reach its peak. Raise training.max_steps, or lower warmup_epochs, for "
            f"example to {total_steps / 10 / steps_per_epoch:.2g}"
        )
    return Schedule(
        total_steps, warmup_steps, peak_lr=training.lr, final_lr=training.lr * training.final_lr_ratio,
        first_momentum=training.ema_momentum, last_momentum=training.ema_final_momentum,
        heads_steps=heads_steps, from_weights=config.model.weights is not None,
    )  # fmt: skip
