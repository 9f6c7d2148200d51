"""The loaders that `bench.py pipeline` compares: ours, a hand-written DALI pipeline, only decoding, and torchvision."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.crops.augment import ViewRecipe
from pipeline.dataset import MultiCropDataset
from pipeline.shards.index import ShardIndex
from tools.benchmarks.measure import LoaderSetup

EXTENSIONS = "jpg;jpeg;png;JPEG;JPG;PNG"
BLUR_KERNEL = 9  # the kernel size of the DINO family's loaders
MakeViews = Callable[[bytes], list[torch.Tensor]]


def ours(setup: LoaderSetup, **options: Any) -> Iterator[Sequence[torch.Tensor]]:
    """Yield batches of this project's loader with its default recipe; `options` go to `build_multicrop_dataloader`."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    loader = build_multicrop_dataloader(
        dataset, setup.batch_size, device=setup.device, num_workers=setup.threads, prefetch=2, **options
    )
    while True:
        for batch in loader:
            yield batch.crops


def dali_native(setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    """Yield the same recipe as a DALI user writes it, with DALI's random numbers and its fused colour operator."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    offset, scale = [255 * value for value in dataset.mean], [255 * value for value in dataset.std]

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        image = _decoded(setup)
        return tuple(_native_crop(image, recipe, offset, scale) for recipe in dataset.recipes)

    yield from _run(graph(**_options(setup)), setup)


def decode_only(setup: LoaderSetup) -> Iterator[Sequence[Any]]:
    """Yield the output of DALI's reader and decoder, with nothing after them."""

    @pipeline_def
    def graph() -> Any:
        return _decoded(setup)

    pipe = graph(**_options(setup))
    while True:
        yield pipe.run()


def _run(pipe: Pipeline, setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    while True:
        outputs = pipe.run(torch.cuda.current_stream() if setup.device == "gpu" else None)
        yield [torch.from_dlpack(output.as_tensor()) for output in outputs]


def _options(setup: LoaderSetup) -> dict[str, Any]:
    return {
        "batch_size": setup.batch_size,
        "num_threads": setup.threads,
        "device_id": 0 if setup.device == "gpu" else None,
        "prefetch_queue_depth": 2,
        "seed": 1,
    }


def _decoded(setup: LoaderSetup) -> "types.DataNode":
    tars = sorted(setup.folder.glob("*.tar"))
    indices = [path.with_suffix(".idx") for path in tars]
    encoded = fn.readers.webdataset(
        paths=[str(path) for path in tars],
        index_paths=[str(path) for path in indices] if all(path.exists() for path in indices) else None,
        ext=[EXTENSIONS],
        random_shuffle=True,
        name="reader",
    )
    return fn.decoders.image(encoded, device="mixed" if setup.device == "gpu" else "cpu", output_type=types.RGB)


def _native_crop(
    image: "types.DataNode", recipe: ViewRecipe, offset: list[float], scale: list[float]
) -> "types.DataNode":
    crop = fn.random_resized_crop(
        image,
        size=(recipe.size, recipe.size),
        random_area=recipe.scale,
        random_aspect_ratio=recipe.ratio,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    jitter, gray = _coin(recipe.jitter_prob), _coin(recipe.gray_prob)
    if jitter or gray:
        # One pass does both: factors of 1 are no jitter, a saturation of 0 is gray.
        crop = fn.color_twist(
            crop,
            brightness=1 + jitter * _uniform(-recipe.brightness, recipe.brightness),
            contrast=1 + jitter * _uniform(-recipe.contrast, recipe.contrast),
            saturation=(1 - gray) * (1 + jitter * _uniform(-recipe.saturation, recipe.saturation)),
            hue=jitter * _uniform(-360 * recipe.hue, 360 * recipe.hue),
        )
    crop = _blur(crop, recipe) if recipe.blur_prob > 0 else crop
    crop = _solarize(crop, recipe) if recipe.solarize_prob > 0 else crop
    flip = fn.random.coin_flip(probability=recipe.flip_prob)  # the operator takes an int32
    return fn.crop_mirror_normalize(crop, dtype=types.FLOAT, output_layout="CHW", mirror=flip, mean=offset, std=scale)


def _blur(crop: "types.DataNode", recipe: ViewRecipe) -> "types.DataNode":
    if _coin(recipe.blur_prob):
        crop = fn.gaussian_blur(crop, sigma=_uniform(*recipe.blur_sigma))
    return crop


def _solarize(crop: "types.DataNode", recipe: ViewRecipe) -> "types.DataNode":
    if _coin(recipe.solarize_prob):
        inverted = [value if value < 128 else 255 - value for value in range(256)]
        crop = fn.lookup_table(crop, keys=list(range(256)), values=inverted, dtype=types.UINT8)
    return crop


def _coin(probability: float) -> "types.DataNode":
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _uniform(low: float, high: float) -> "types.DataNode":
    return fn.random.uniform(range=(low, high))


def torchvision_pil(setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    """Yield crops of Pillow images by torchvision's v1 transforms, composed as in the loaders of DINOv2 and DINOv3."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    last = [v1.ToTensor(), v1.Normalize(dataset.mean, dataset.std)]
    transforms = [_transform(v1, recipe, last) for recipe in dataset.recipes]

    def views(encoded: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return [transform(image) for transform in transforms]

    yield from _load(setup, dataset, views)


def torchvision_v2(setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    """Yield crops of tensors by transforms v2, in uint8 until the last step: the fast way according to its documentation."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
    transforms = [_transform(v2, recipe, last) for recipe in dataset.recipes]

    def views(encoded: bytes) -> list[torch.Tensor]:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
        return [transform(image) for transform in transforms]

    yield from _load(setup, dataset, views)


class Samples(Dataset):
    def __init__(self, index: ShardIndex, views: MakeViews) -> None:
        self.index, self.views = index, views

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> tuple[list[torch.Tensor], int]:
        return self.views(self.index.encoded(row)), int(self.index.samples["label"][row])


def _load(setup: LoaderSetup, dataset: MultiCropDataset, views: MakeViews) -> Iterator[Sequence[torch.Tensor]]:
    order = np.random.default_rng(0).permutation(len(dataset.index)).tolist()
    loader: DataLoader = DataLoader(
        Samples(dataset.index, views),
        setup.batch_size,
        sampler=itertools.cycle(order),
        num_workers=setup.threads,  # each runs torch on one thread
        multiprocessing_context="fork",
    )
    for crops, _ in loader:
        yield crops


def _transform(tv: ModuleType, recipe: ViewRecipe, last: list[Any]) -> Any:
    """Return the recipe as transforms v1 or v2, whose names and arguments are the same."""
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
