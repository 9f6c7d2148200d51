"""From the settings of the user's guide to a data set of crops and its loader."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.draws import ViewRecipe
from pipeline.index import ShardIndex, open_index, split_folder
from pipeline.loader import MultiCropLoader
from pipeline.quarantine import Quarantine

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MultiCropDataset:
    """Shards and what is made of each of their samples. `mean` and `std` normalise the crops, in 0..1."""

    index: ShardIndex
    recipes: tuple[ViewRecipe, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.index)


def build_multicrop_dataset(
    dataset_name: str,
    data_path: Path | str,
    split: str = "train",
    *,
    num_global_crops: int = 2,
    num_local_crops: int = 6,
    global_crop_size: int = 224,
    local_crop_size: int = 96,
    global_crop_scale: tuple[float, float] = (0.4, 1.0),
    local_crop_scale: tuple[float, float] = (0.05, 0.4),
    global_color_jitter: float = 0.4,
    local_color_jitter: float = 0.4,
    flip_prob: float = 0.5,
    color_jitter_prob: float = 0.8,
    gray_prob: float = 0.2,
    global_blur_prob: Sequence[float] = (1.0, 0.1),
    local_blur_prob: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_prob: Sequence[float] = (0.0, 0.2),
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> MultiCropDataset:
    """Open the shards of one split and describe its crops, globals first.

    Sizes are pixels, scales shares of the image's area. A jitter strength s means brightness and contrast s, saturation s / 2
    and hue s / 4. `global_blur_prob` and `solarize_prob` hold one value per global crop; the last one serves any further crop.

    Raises FileNotFoundError when there are no shards, ValueError when they do not fit their index.
    """

    def view(size: int, scale: tuple[float, float], jitter: float, blur: float, solarize: float) -> ViewRecipe:
        return ViewRecipe(
            size,
            scale,
            flip_prob=flip_prob,
            jitter_prob=color_jitter_prob if jitter > 0 else 0.0,
            brightness=jitter,
            contrast=jitter,
            saturation=jitter / 2,
            hue=jitter / 4,
            gray_prob=gray_prob,
            blur_prob=blur,
            blur_sigma=blur_sigma,
            solarize_prob=solarize,
        )

    recipes = [
        view(
            global_crop_size,
            global_crop_scale,
            global_color_jitter,
            global_blur_prob[min(g, len(global_blur_prob) - 1)],
            solarize_prob[min(g, len(solarize_prob) - 1)],
        )
        for g in range(num_global_crops)
    ]
    recipes += [
        view(local_crop_size, local_crop_scale, local_color_jitter, local_blur_prob, 0.0)
        for _ in range(num_local_crops)
    ]
    return MultiCropDataset(open_index(split_folder(dataset_name, data_path, split)), tuple(recipes), mean, std)


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
    device: str = "auto",
    device_id: int = 0,
    num_workers: int | str = "auto",
    hw_decoder_load: float = 0.65,
    prefetch: int = 2,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    normalized: bool = True,
    quarantine: Path | str | None = None,
    max_bad_share: float = 0.01,
) -> MultiCropLoader:
    """A loader of `CropBatch`: `for crops, labels in loader`.

    `batch_size` is per rank. `device`: `gpu`, `cpu`, or `auto` for the GPU when torch sees one. `num_workers`: CPU threads of
    DALI, `auto` for half of this process's cores (`pipeline.tuning` measures what is best). `hw_decoder_load`: share of the JPEGs
    that the GPU's own engine decodes. `normalized`: crops as float32, normalised by the data set's mean and std;
    False: uint8. `quarantine`: the file in which samples that cannot be decoded are remembered; more than `max_bad_share` of
    all samples is an error.
    """
    return MultiCropLoader(
        dataset.index,
        dataset.recipes,
        batch_size,
        seed=seed,
        device=resolve_device(device),
        device_id=device_id,
        num_threads=default_threads() if num_workers == "auto" else int(num_workers),
        hw_decoder_load=hw_decoder_load,
        prefetch=prefetch,
        rank=rank,
        world_size=world_size,
        mean=dataset.mean,
        std=dataset.std,
        shuffle=shuffle,
        drop_last=drop_last,
        normalized=normalized,
        quarantine=Quarantine(dataset.index, Path(quarantine) if quarantine else None, max_bad_share),
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
