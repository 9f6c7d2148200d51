"""The settings of a run turned into its objects: the one place where config keys meet arguments."""

import logging
from pathlib import Path
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, Level, default_levels
from model.losses import LossWeights
from model.masks import MultiCropMaskGenerator
from model.predictor import Predictor
from pipeline.crops.augment import Augmentation
from pipeline.crops.device import DeviceError, check_decoder
from pipeline.dataset import (
    MultiCropDataset,
    build_multicrop_dataloader,
    build_multicrop_dataset,
    centre_crop_dataset,
    default_threads,
    own_cores,
    resolve_device,
)
from pipeline.loader import MultiCropLoader
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import open_index, split_folder
from train.config.schema import Config
from train.distributed import Ranks
from train.evaluation.features import spread_rows
from train.evaluation.labels import check_classes
from train.optim import Schedule

log = logging.getLogger(__name__)

ALONE = Ranks()
HW_DECODER_LOAD = 0.65  # DALI's own default
WIDE = 128  # where a second thread of torch begins to pay


def torch_threads(config: Config) -> int:
    """Torch's threads when it computes on the CPU next to DALI: what `default_threads` leaves, and two for a wide encoder.

    On two cores DALI's thread mostly waits. With both, an encoder 128 wide trains faster, one of 64 slower than with one.
    """
    width = config.model.encoder_kwargs.get("embed_dim")
    wide = not isinstance(width, int) or width >= WIDE
    return min(own_cores(), max(own_cores() - default_threads(), 2 if wide else 1))


def build_dataset(config: Config) -> MultiCropDataset:
    data, crops = config.data, config.data.multicrop
    num_global, num_local = data.crop_counts
    return build_multicrop_dataset(
        data.dataset,
        data.data_path,
        num_global_crops=num_global,
        num_local_crops=num_local,
        global_crop_size=crops.global_crop_size,
        local_crop_size=crops.local_crop_size,
        global_crop_scale=crops.global_crop_scale,
        local_crop_scale=crops.local_crop_scale,
        global_color_jitter=crops.global_color_jitter,
        local_color_jitter=crops.local_color_jitter,
        augmentation=Augmentation(**data.augmentation.model_dump()),
    ).cached(cache_settings(config))


def cache_settings(config: Config) -> CacheSettings:
    """Where the shards of a store are kept."""
    data = config.data
    folder = Path(data.cache_dir).expanduser() if data.cache_dir else None
    return CacheSettings(folder, int(data.cache_size_gb * 1e9), data.store_retry_s, data.store_streams)


def build_loader(
    config: Config, dataset: MultiCropDataset, batch_size: int, ranks: Ranks = ALONE, **changes: Any
) -> MultiCropLoader:
    """A loader with the run's device, seed and threads; `changes` override single arguments."""
    arguments: dict[str, Any] = {
        "seed": config.seed,
        "device": config.device,
        "device_id": ranks.local_rank,
        "crop_device": config.data.crop_device,
        "num_workers": config.data.num_workers,
        "hw_decoder_load": HW_DECODER_LOAD if config.data.hw_decoder_load == "auto" else config.data.hw_decoder_load,
        "prefetch": config.data.prefetch,
        "use_mmap": config.data.use_mmap,
        "max_bad_share": config.data.max_bad_share,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    return build_multicrop_dataloader(dataset, batch_size, **(arguments | changes))


def build_training_loader(
    config: Config, dataset: MultiCropDataset, ranks: Ranks = ALONE, **changes: Any
) -> MultiCropLoader:
    """Crops as uint8, which the model normalises. Raises ValueError when the data set is smaller than one step."""
    loader = build_loader(config, dataset, config.data.batch_size, ranks, normalized=False, **changes)
    needed = loader.global_batch * config.training.accumulation_steps
    if len(dataset) < needed:
        raise ValueError(
            f"{dataset.index.folder}: {len(dataset)} samples are fewer than one step of {needed} (batch_size "
            f"{config.data.batch_size} x {ranks.world_size} ranks x {config.training.accumulation_steps} accumulation "
            "steps). Lower data.batch_size or training.accumulation_steps"
        )
    return loader


def describe_epoch(config: Config, loader: MultiCropLoader) -> str:
    """How much data there is, and how many samples an epoch leaves out because they do not fill a step."""
    count, per_step = len(loader.index), loader.global_batch * config.training.accumulation_steps
    dropped = f"; each epoch leaves out {count % per_step} others, which fill no step" if count % per_step else ""
    shards = len(loader.index.shards)
    return f"data: {count:,} images in {shards} shards, {count // per_step:,} steps of {per_step} an epoch{dropped}"


def with_crop_device(config: Config) -> Config:
    """`config` with data.crop_device cpu in place of `auto` where the GPU's decoder does not work."""
    if resolve_device(config.device) != "gpu" or config.data.crop_device != "auto":
        return config
    try:
        check_decoder("gpu")
    except DeviceError as error:
        log.warning("crops are made on the cpu, not on the gpu: %s", error)
        return config.model_copy(update={"data": config.data.model_copy(update={"crop_device": "cpu"})})
    return config


def build_evaluation_loaders(config: Config, shuffle: bool = False) -> tuple[MultiCropLoader, MultiCropLoader]:
    """Centre crops of the training split, in stored order unless `shuffle`, and of the validation split.

    Of each at most `evaluation.max_samples` images. FileNotFoundError when a split is missing, ValueError when their labels
    mean different classes.
    """
    loaders = []
    folders = [split_folder(config.data.dataset, config.data.data_path, split) for split in ("train", "val")]
    if folders[0] == folders[1]:
        raise FileNotFoundError(f"{folders[0]}: one split alone; evaluation needs train/ and val/ in it")
    indices = [spread_rows(open_index(folder), config.evaluation.max_samples) for folder in folders]
    check_classes(*indices)
    for folder, index in zip(folders, indices, strict=True):
        dataset = centre_crop_dataset(
            index.cached(cache_settings(config)),
            config.data.multicrop.global_crop_size,
            config.evaluation.crop_ratio,
            config.data.augmentation.mean,
            config.data.augmentation.std,
        )
        shuffled = shuffle and folder == folders[0]
        loaders.append(build_loader(config, dataset, config.evaluation.batch_size, shuffle=shuffled, drop_last=False))
    return loaders[0], loaders[1]


def build_model(config: Config, device: torch.device) -> HJEPA:
    """The model at its seeded initialisation."""
    torch.manual_seed(config.seed)
    crops, settings, loss = config.data.multicrop, config.model, config.loss
    num_global, num_local = config.data.crop_counts
    sizes = [crops.global_crop_size] + ([crops.local_crop_size] if num_local else [])
    mean, std = config.data.augmentation.mean, config.data.augmentation.std
    encoder = MultiCropEncoder(settings.encoder, sizes, mean=mean, std=std, **settings.encoder_kwargs)
    levels = build_levels(config, encoder.depth)
    predictor = None
    if loss.prediction_weight > 0:
        shape = (settings.predictor_width, settings.predictor_depth, settings.predictor_heads)
        predictor = Predictor(encoder.width, *shape, len(levels))
    model = HJEPA(
        encoder,
        predictor,
        levels,
        num_global_crops=num_global,
        global_crop_size=crops.global_crop_size,
        projector_hidden=settings.projector_hidden,
        projector_dim=settings.projector_dim,
        sigreg_knots=config.loss.sigreg_knots,
        weights=LossWeights(loss.prediction_weight, loss.summary_weight, loss.view_weight, loss.sigreg_weight),
        exclude_covered=config.masking.exclude_covered,
        grad_checkpointing=settings.grad_checkpointing,
    )
    return model.to(device)


def build_levels(config: Config, depth: int) -> tuple[Level, ...]:
    """The configured levels, their layers counted from 0. Raises ValueError for a layer that the encoder does not have."""
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


def build_masks(config: Config, model: HJEPA, device: torch.device) -> MultiCropMaskGenerator:
    num_global, num_local = config.data.crop_counts
    return MultiCropMaskGenerator(
        config.masking.strategy,
        num_global,
        num_local,
        grid=model.grid,
        local_grid=config.data.multicrop.local_crop_size // model.encoder.patch_size,
        strides=() if model.predictor is None else tuple(level.stride for level in model.levels),
        num_masks=config.masking.num_masks,
        mask_scale=config.masking.mask_scale,
        aspect_ratio=config.masking.aspect_ratio,
        context_ratio=config.masking.context_ratio,
        query_ratio=config.masking.query_ratio,
        device=device,
    )


def build_schedule(config: Config, batches_per_epoch: int) -> Schedule:
    training = config.training
    steps_per_epoch = batches_per_epoch // training.accumulation_steps
    total = training.epochs * steps_per_epoch
    return Schedule(
        total_steps=min(total, training.max_steps or total),
        warmup_steps=round(training.warmup_epochs * steps_per_epoch),
        peak_lr=training.lr,
        final_lr=training.lr * training.final_lr_ratio,
        first_momentum=training.ema_momentum,
        last_momentum=training.ema_final_momentum,
    )


def amp_enabled(config: Config, device: torch.device) -> bool:
    """bf16 only pays where the hardware multiplies in it: on CPUs it was slower than float32."""
    return config.training.use_amp and device.type == "cuda"


def crop_sizes(config: Config) -> list[int]:
    """Pixels of each crop of an image, globals first."""
    (num_global, num_local), crops = config.data.crop_counts, config.data.multicrop
    return [crops.global_crop_size] * num_global + [crops.local_crop_size] * num_local
