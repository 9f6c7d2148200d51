"""Settings of the data: where it is, how many crops, and what is drawn for each."""

from collections.abc import Iterator
from typing import Literal

from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD, NUM_GLOBAL_CROPS, NUM_LOCAL_CROPS
from train.config.types import (
    BrokenRule,
    Count,
    Flag,
    JitterStrength,
    LessThanOne,
    PerGlobal,
    Place,
    Positive,
    PositiveRange,
    Section,
    Share,
    ShareRange,
    Whole,
)


class MultiCrop(Section):
    num_global_crops: Count = NUM_GLOBAL_CROPS
    num_local_crops: Whole = NUM_LOCAL_CROPS
    global_crop_size: Count = 224
    local_crop_size: Count = 96
    global_crop_scale: ShareRange = (0.4, 1.0)
    """Area of a crop as a share of its source image."""
    local_crop_scale: ShareRange = (0.05, 0.4)
    global_color_jitter: JitterStrength = 0.4
    """Strength s: brightness and contrast s, saturation s/2, hue s/4."""
    local_color_jitter: JitterStrength = 0.4


class Augmentation(Section):
    flip_prob: Share = 0.5
    color_jitter_prob: Share = 0.8
    gray_prob: Share = 0.2
    global_blur_prob: PerGlobal = (1.0, 0.1)
    """One for each global crop, or a single number for all."""
    local_blur_prob: Share = 0.5
    blur_sigma: PositiveRange = (0.1, 2.0)
    solarize_prob: PerGlobal = (0.0, 0.2)
    """One for each global crop, or a single number for all."""
    mean: tuple[Share, Share, Share] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD


class Data(Section):
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "sample", "custom"] = "imagenet"
    data_path: Place
    """Folder or s3:// prefix that holds train/ and val/ with their shards."""
    batch_size: Count = 64
    """Images per rank."""
    num_workers: Count | Literal["auto"] = "auto"
    """CPU threads of DALI; auto measures at the start on a GPU, and leaves torch half of the cores on a CPU."""
    hw_decoder_load: Share | Literal["auto"] = "auto"
    """Share of the JPEGs that the GPU's own engine decodes, where it has one; auto measures at the start."""
    prefetch: Count = 2
    """Batches made ahead."""
    use_mmap: Flag | Literal["auto"] = "auto"
    """Read shards through memory mappings; auto: on local disks, not on network file systems."""
    max_bad_share: LessThanOne = 0.01
    """A run stops when more of the samples than this cannot be decoded; until then others stand in for them."""
    use_multicrop: Flag = True
    """false: one global crop and no local ones, whatever multicrop counts."""
    multicrop: MultiCrop = MultiCrop()
    augmentation: Augmentation = Augmentation()

    @property
    def crop_counts(self) -> tuple[int, int]:
        """(global, local) crops of each image."""
        return (self.multicrop.num_global_crops, self.multicrop.num_local_crops) if self.use_multicrop else (1, 0)

    def rules(self) -> Iterator[BrokenRule]:
        count = self.crop_counts[0]
        for key in ("global_blur_prob", "solarize_prob"):
            values = getattr(self.augmentation, key)
            if isinstance(values, tuple) and len(values) < count:
                keys = (f"augmentation.{key}", "multicrop.num_global_crops", "use_multicrop")
                yield keys, f"has {len(values)} values for {count} global crops; give {count}, or one number for all"
