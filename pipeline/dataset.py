"""The Python interface: build a data set of crops and its loader from plain settings."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import defaults
from pipeline.batch import Normalization
from pipeline.crops.augment import Augmentation, ViewRecipe
from pipeline.crops.graph import ReaderOptions
from pipeline.loader import MultiCropLoader
from pipeline.order import BatchSequence, Plan
from pipeline.quarantine import Quarantine
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.storage import resolve_use_mmap

DEFAULT_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class MultiCropDataset:
    """Shards, and the crops to make of each sample. `mean` and `std` normalise the crops, in 0..1."""

    index: ShardIndex
    recipes: tuple[ViewRecipe, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.index)

    def cached(self, settings: CacheSettings) -> "MultiCropDataset":
        """Return the same with another cache for shards from a store."""
        return replace(self, index=self.index.cached(settings))


def build_multicrop_dataset(
    dataset_name: str,
    data_path: Path | str,
    split: str = "train",
    *,
    num_global_crops: int = defaults.NUM_GLOBAL_CROPS,
    num_local_crops: int = defaults.NUM_LOCAL_CROPS,
    global_crop_size: int = defaults.GLOBAL_CROP_SIZE,
    local_crop_size: int = defaults.LOCAL_CROP_SIZE,
    global_crop_scale: tuple[float, float] = defaults.GLOBAL_CROP_SCALE,
    local_crop_scale: tuple[float, float] = defaults.LOCAL_CROP_SCALE,
    global_color_jitter: float = defaults.COLOR_JITTER,
    local_color_jitter: float = defaults.COLOR_JITTER,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
) -> MultiCropDataset:
    """Open the shards of one split and describe its crops, globals first.

    Sizes are in pixels, scales are fractions of the image's area, and a jitter strength s means brightness and contrast s,
    saturation s / 2 and hue s / 4. `data_path` is a folder, or a prefix such as `s3://BUCKET/PREFIX`
    (`pipeline.shards.storage`), whose shards are cached on a local disk (`MultiCropDataset.cached`).

    Raises FileNotFoundError if there are no shards, ValueError if they do not match their index, StoreError if the store does not
    answer.
    """
    view = augmentation.view
    recipes = [view(global_crop_size, global_crop_scale, global_color_jitter, g) for g in range(num_global_crops)]
    recipes += [view(local_crop_size, local_crop_scale, local_color_jitter, None)] * num_local_crops
    index = open_index(split_folder(dataset_name, data_path, split))
    return MultiCropDataset(index, tuple(recipes), augmentation.mean, augmentation.std)


def centre_crop_dataset(
    index: ShardIndex,
    size: int,
    crop_ratio: float,
    mean: tuple[float, float, float] = defaults.IMAGENET_MEAN,
    std: tuple[float, float, float] = defaults.IMAGENET_STD,
) -> MultiCropDataset:
    """Describe one deterministic crop per image, for evaluation: the central square of `crop_ratio` of the shorter side."""
    return MultiCropDataset(index, (ViewRecipe(size, None, centre_ratio=crop_ratio),), mean, std)


def build_multicrop_dataloader(
    dataset: MultiCropDataset,
    batch_size: int = defaults.BATCH_SIZE,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    normalized: bool = True,
    quarantine: Path | str | None = None,
    max_bad_share: float = defaults.MAX_BAD_SHARE,
    device: str = "auto",
    crop_device: str = "auto",
    num_workers: int | str = "auto",
    use_mmap: bool | str = "auto",
    **options: Any,
) -> MultiCropLoader:
    """Build a loader of `CropBatch`: `for crops, labels in loader`.

    `batch_size` is per rank. `normalized`: crops as float32, normalised by the data set's mean and std; False: uint8.
    `quarantine`: the file that remembers samples which cannot be decoded; the first of them makes it, in a folder that must exist
    by then. More bad samples than `max_bad_share` of all are an error. `device`, `crop_device`: `gpu`, `cpu`, or `auto` for the
    GPU if torch sees one. `num_workers`: DALI's CPU threads, `auto` for half of this process's cores. `use_mmap`: `auto` for
    local disks only. `options`: as in `ReaderOptions`.
    """
    index = dataset.index
    sequence = BatchSequence(
        index,
        Plan(index.counts, seed, shuffle),
        Quarantine(index, Path(quarantine) if quarantine else None, max_bad_share),
        batch_size,
        rank,
        world_size,
        drop_last,
    )
    reader = ReaderOptions(
        device=resolve_device(device),
        crop_device=resolve_device(device) if crop_device == "auto" else crop_device,
        num_threads=default_threads() if num_workers == "auto" else int(num_workers),
        use_mmap=resolve_use_mmap(use_mmap, index.folder if index.remote is None else index.remote.cache.folder),
        **options,
    )
    normalization = Normalization(dataset.mean, dataset.std) if normalized else None
    return MultiCropLoader(sequence, dataset.recipes, reader, normalization)


def resolve_device(device: str) -> str:
    """Return `gpu` or `cpu`; `auto` is `gpu` if torch sees a CUDA GPU."""
    if device != "auto":
        return device
    return "gpu" if torch.cuda.is_available() else "cpu"


def own_cores() -> int:
    """Return the cores that this process may use, divided among the ranks that torchrun started on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_threads() -> int:
    """Return half of this process's cores, at least one. The other half is for torch and its data movement."""
    return max(1, own_cores() // 2)
