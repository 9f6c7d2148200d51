"""A data set of crops, the batches that are made of it, and their normalisation."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pipeline import defaults
from pipeline.crops.augment import Augmentation, ViewRecipe
from pipeline.files import expand_path
from pipeline.shards.converted import as_shards
from pipeline.shards.index import ShardIndex, open_index, split_folder

DEFAULT_AUGMENTATION = Augmentation()
Range = tuple[float, float]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class CropBatch:
    """All crops of B samples. Unpacks as `crops, labels`.

    `crops`: V tensors `[B, 3, S, S]`, globals first: `float32`, normalised, or `uint8`, 0..255, depending on the loader.
    `labels`: `[B] int64`, -1 if unlabelled. `boxes`: `[B, V, 4] float32`, y0, x0, y1, x1 of each crop in its source image,
    0..1. `flips`: `[B, V] bool`, crop mirrored left to right. `positions`: `[B] int64`, positions in the epoch's order. All are
    on the loader's device.
    """

    crops: list[torch.Tensor]
    labels: torch.Tensor
    boxes: torch.Tensor
    flips: torch.Tensor
    positions: torch.Tensor

    def __iter__(self) -> Iterator[list[torch.Tensor] | torch.Tensor]:
        yield self.crops
        yield self.labels


@dataclass(frozen=True)
class Normalization:
    """`[..., 3, S, S] uint8 -> float32`: `(crops / 255 - mean) / std` for each channel."""

    mean: Channels
    std: Channels

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        return (crops - _levels(self.mean, crops.device)).div_(_levels(self.std, crops.device))

    @property
    def scaling(self) -> np.ndarray:
        """`[3, 2] float32`: each channel's offset, which is subtracted from its grey levels, and its spread, the divisor."""
        return 255 * np.array([self.mean, self.std], np.float32).T


@cache  # a copy to a GPU would wait for it on every call
def _levels(values: Channels, device: torch.device) -> torch.Tensor:
    """Return `[3, 1, 1]`, from 0..1 to grey levels."""
    return 255 * torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


@dataclass(frozen=True)
class MultiCropDataset:
    """Shards, and the crops to make of each sample. `mean` and `std` normalise the crops, in 0..1."""

    index: ShardIndex
    recipes: tuple[ViewRecipe, ...]
    mean: Channels
    std: Channels

    def __len__(self) -> int:
        return len(self.index)


def build_multicrop_dataset(
    dataset_name: str, data_path: Path | str, split: str = "train", *,
    num_global_crops: int = defaults.NUM_GLOBAL_CROPS, num_local_crops: int = defaults.NUM_LOCAL_CROPS,
    global_crop_size: int = defaults.GLOBAL_CROP_SIZE, local_crop_size: int = defaults.LOCAL_CROP_SIZE,
    global_crop_scale: Range = defaults.GLOBAL_CROP_SCALE, local_crop_scale: Range = defaults.LOCAL_CROP_SCALE,
    global_color_jitter: float = defaults.COLOR_JITTER, local_color_jitter: float = defaults.COLOR_JITTER,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
) -> MultiCropDataset:  # fmt: skip
    """Open the shards of one split and describe its crops, globals first.

    Sizes are in pixels, scales are fractions of the image's area, and a jitter strength s means brightness and contrast s,
    saturation s / 2 and hue s / 4. `data_path`: what is not in shards on a local disk is brought there once: pictures are
    converted (`pipeline.shards.converted`), a prefix such as `s3://BUCKET/PREFIX` is copied (`pipeline.shards.copied`). Raises
    FileNotFoundError if there are no shards, ValueError if they do not match their index, StoreError if a store fails.
    """
    view = augmentation.view
    recipes = [view(global_crop_size, global_crop_scale, global_color_jitter, g) for g in range(num_global_crops)]
    recipes += [view(local_crop_size, local_crop_scale, local_color_jitter, None)] * num_local_crops
    index = open_index(split_folder(dataset_name, as_shards(dataset_name, expand_path(str(data_path))), split))
    return MultiCropDataset(index, tuple(recipes), augmentation.mean, augmentation.std)


def centre_crop_dataset(
    index: ShardIndex, size: int, crop_ratio: float,
    mean: Channels = defaults.IMAGENET_MEAN, std: Channels = defaults.IMAGENET_STD,
) -> MultiCropDataset:  # fmt: skip
    """Describe one deterministic crop per image, for evaluation: the central square of `crop_ratio` of the shorter side."""
    return MultiCropDataset(index, (ViewRecipe(size, None, centre_ratio=crop_ratio),), mean, std)


def resolve_device(device: str) -> str:
    """Return `gpu` or `cpu`; `auto` is `gpu` if torch sees a CUDA GPU."""
    return device if device != "auto" else "gpu" if torch.cuda.is_available() else "cpu"


def own_cores() -> int:
    """Return the cores that this process may use, divided among the ranks that torchrun started on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_threads() -> int:
    """Return half of this process's cores, at least one. The other half is for torch and its data movement."""
    return max(1, own_cores() // 2)
