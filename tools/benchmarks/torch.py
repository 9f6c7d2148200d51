"""The rows of `bench.py pipeline` that run in worker processes of torch's DataLoader."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline.crops.augment import ViewRecipe
from pipeline.dataset import MultiCropDataset, build_multicrop_dataset
from pipeline.shards.index import ShardIndex
from tools.benchmarks.measure import Setup

BLUR_KERNEL = 9  # of the DINO family's loaders
Views = Callable[[bytes], list[torch.Tensor]]


def torchvision_pil(setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    """Pillow images and torchvision's first transforms, composed as the DINOv2 and DINOv3 loaders do."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    last = [v1.ToTensor(), v1.Normalize(dataset.mean, dataset.std)]
    transforms = [_transform(v1, recipe, last) for recipe in dataset.recipes]

    def views(encoded: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return [transform(image) for transform in transforms]

    yield from _load(setup, dataset, views)


def torchvision_v2(setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    """Tensors and transforms v2: uint8 until the last step, the fast way according to its documentation."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
    transforms = [_transform(v2, recipe, last) for recipe in dataset.recipes]

    def views(encoded: bytes) -> list[torch.Tensor]:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
        return [transform(image) for transform in transforms]

    yield from _load(setup, dataset, views)


def lightly_train(setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    """lightly-train's DINOv2 transform with our recipe's numbers; it resizes by OpenCV's area interpolation."""
    from lightly_train._methods.dinov2.dinov2_transform import DINOv2ViTTransform

    dataset = build_multicrop_dataset("custom", setup.folder)
    transform = DINOv2ViTTransform(_lightly_arguments(dataset))

    def views(encoded: bytes) -> list[torch.Tensor]:
        image = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        return [view["image"] for view in transform({"image": image})]

    yield from _load(setup, dataset, views)


def lightly_train_installed() -> bool:
    return find_spec("lightly_train") is not None


class _Samples(Dataset):
    def __init__(self, index: ShardIndex, views: Views) -> None:
        self.index, self.views = index, views

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> tuple[list[torch.Tensor], int]:
        return self.views(self.index.encoded(row)), int(self.index.samples["label"][row])


def _load(setup: Setup, dataset: MultiCropDataset, views: Views) -> Iterator[Sequence[torch.Tensor]]:
    order = np.random.default_rng(0).permutation(len(dataset.index)).tolist()
    loader: DataLoader = DataLoader(
        _Samples(dataset.index, views),
        setup.batch_size,
        sampler=itertools.cycle(order),
        num_workers=setup.threads,  # each sets torch's threads to 1
        multiprocessing_context="fork",
    )
    for crops, _ in loader:
        yield crops


def _transform(tv: ModuleType, recipe: ViewRecipe, last: list[Any]) -> Any:
    """The recipe in torchvision's transforms v1 or v2, whose names and arguments are the same."""
    assert recipe.scale is not None
    jitter = tv.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    steps = [
        tv.RandomResizedCrop(recipe.size, recipe.scale, recipe.ratio, v1.InterpolationMode.BILINEAR, antialias=True),
        tv.RandomHorizontalFlip(recipe.flip_prob),
        tv.RandomApply([jitter], recipe.jitter_prob),
        tv.RandomGrayscale(recipe.gray_prob),
    ]
    if recipe.blur_prob > 0:
        steps.append(tv.RandomApply([tv.GaussianBlur(BLUR_KERNEL, recipe.blur_sigma)], recipe.blur_prob))
    if recipe.solarize_prob > 0:
        steps.append(tv.RandomSolarize(128, recipe.solarize_prob))
    return tv.Compose([*steps, *last])


def _lightly_arguments(dataset: MultiCropDataset) -> Any:
    """Their arguments with the numbers of the recipes of global 0, global 1 and the first local."""
    from lightly_train._methods.dinov2.dinov2_transform import DINOv2ViTTransformArgs

    first, second, local = (dataset.recipes[v] for v in (0, 1, -1))

    def crop(recipe: ViewRecipe) -> dict[str, float]:
        assert recipe.scale is not None
        return {"min_scale": recipe.scale[0], "max_scale": recipe.scale[1]}

    def blur(recipe: ViewRecipe) -> dict[str, Any]:
        return {"prob": recipe.blur_prob, "sigmas": recipe.blur_sigma}

    return DINOv2ViTTransformArgs.model_validate(
        {
            "image_size": (first.size, first.size),
            "random_resize": crop(first),
            "random_flip": {"horizontal_prob": first.flip_prob},
            "color_jitter": {
                "prob": first.jitter_prob,
                "strength": 1.0,
                "brightness": first.brightness,
                "contrast": first.contrast,
                "saturation": first.saturation,
                "hue": first.hue,
            },
            "random_gray_scale": first.gray_prob,
            "normalize": {"mean": dataset.mean, "std": dataset.std},
            "gaussian_blur": blur(first),
            "global_view_1": {"gaussian_blur": blur(second), "solarize": {"prob": second.solarize_prob}},
            "local_view": {
                "num_views": sum(recipe.size == local.size for recipe in dataset.recipes),
                "view_size": (local.size, local.size),
                "random_resize": crop(local),
                "gaussian_blur": blur(local),
            },
        }
    )
