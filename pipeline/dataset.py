"""From the settings of the user's guide to a data set of crops and its loader."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import Normalization
from pipeline.crops.augment import Augmentation, ViewRecipe
from pipeline.crops.graph import ReaderOptions
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD, NUM_GLOBAL_CROPS, NUM_LOCAL_CROPS
from pipeline.loader import MultiCropLoader
from pipeline.plan import Plan
from pipeline.quarantine import Quarantine
from pipeline.sequence import BatchSequence
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.storage import resolve_use_mmap

DEFAULT_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class MultiCropDataset:
    """Shards and what is made of each of their samples. `mean` and `std` normalise the crops, in 0..1."""

    index: ShardIndex
    recipes: tuple[ViewRecipe, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.index)

    def cached(self, settings: CacheSettings) -> "MultiCropDataset":
        """The same, with another cache for shards that come from a store."""
        return replace(self, index=self.index.cached(settings))


def build_multicrop_dataset(
    dataset_name: str,
    data_path: Path | str,
    split: str = "train",
    *,
    num_global_crops: int = NUM_GLOBAL_CROPS,
    num_local_crops: int = NUM_LOCAL_CROPS,
    global_crop_size: int = 224,
    local_crop_size: int = 96,
    global_crop_scale: tuple[float, float] = (0.4, 1.0),
    local_crop_scale: tuple[float, float] = (0.05, 0.4),
    global_color_jitter: float = 0.4,
    local_color_jitter: float = 0.4,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
) -> MultiCropDataset:
    """Open the shards of one split and describe its crops, globals first.

    Sizes are pixels, scales shares of the image's area. A jitter strength s means brightness and contrast s, saturation s / 2
    and hue s / 4. `data_path` is a folder, or a prefix such as `s3://BUCKET/PREFIX` (`pipeline.shards.object_store`), whose
    shards go through a cache on a local disk (`MultiCropDataset.cached`).

    Raises FileNotFoundError when there are no shards, ValueError when they do not fit their index, StoreError for a store that
    does not answer.
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
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> MultiCropDataset:
    """One deterministic crop per image, for evaluation: the central square of `crop_ratio` of the shorter side."""
    return MultiCropDataset(index, (ViewRecipe(size, None, centre_ratio=crop_ratio),), mean, std)


def build_multicrop_dataloader(
    dataset: MultiCropDataset,
    batch_size: int = 64,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    normalized: bool = True,
    quarantine: Path | str | None = None,
    max_bad_share: float = 0.01,
    **reader: Any,
) -> MultiCropLoader:
    """A loader of `CropBatch`: `for crops, labels in loader`.

    `batch_size` is per rank. `normalized`: crops as float32, normalised by the data set's mean and std; False: uint8.
    `quarantine`: the file in which samples that cannot be decoded are remembered; more than `max_bad_share` of all samples is
    an error. `reader`: `device`, `num_workers`, and any other argument of `resolve_reader`.
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
    normalization = Normalization(dataset.mean, dataset.std) if normalized else None
    folder = index.folder if index.remote is None else index.remote.cache.folder
    return MultiCropLoader(sequence, dataset.recipes, resolve_reader(folder, **reader), normalization)


def resolve_reader(
    folder: Path | str,
    *,
    device: str = "auto",
    crop_device: str = "auto",
    num_workers: int | str = "auto",
    use_mmap: bool | str = "auto",
    **options: Any,
) -> ReaderOptions:
    """The options for reading the shards in `folder`, with a value for every `auto`; `options` as in `ReaderOptions`.

    `device`: `gpu`, `cpu`, or `auto` for the GPU when torch sees one. `crop_device`: `auto` for the same. `num_workers`: CPU
    threads of DALI, `auto` for half of this process's cores. `use_mmap`: `auto` for local disks only.
    """
    return ReaderOptions(
        device=resolve_device(device),
        crop_device=resolve_device(device) if crop_device == "auto" else crop_device,
        num_threads=default_threads() if num_workers == "auto" else int(num_workers),
        use_mmap=resolve_use_mmap(use_mmap, folder),
        **options,
    )


def resolve_device(device: str) -> str:
    """`auto` -> `gpu` when torch sees a CUDA GPU, else `cpu`."""
    if device != "auto":
        return device
    return "gpu" if torch.cuda.is_available() else "cpu"


def own_cores() -> int:
    """The cores that this process may use, shared out among the ranks of this machine that torchrun started."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_threads() -> int:
    """Half of this process's cores, at least one: the other half is left to torch and its data movement."""
    return max(1, own_cores() // 2)
