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
from pipeline.shards.index import ShardIndex
from tools.benchmarks.measure import LoaderSetup

EXTENSIONS = "jpg;jpeg;png;JPEG;JPG;PNG"
SOLARIZED = [value if value < 128 else 255 - value for value in range(256)]
BLUR_KERNEL = 9  # the kernel size of the DINO family's loaders


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

    def crops(image: "types.DataNode") -> list["types.DataNode"]:
        return [_native_crop(image, recipe, offset, scale) for recipe in dataset.recipes]

    pipe = _graph(setup, crops)
    while True:
        outputs = pipe.run(torch.cuda.current_stream() if setup.device == "gpu" else None)
        yield [torch.from_dlpack(output.as_tensor()) for output in outputs]


def decode_only(setup: LoaderSetup) -> Iterator[Sequence[Any]]:
    """Yield the output of DALI's reader and decoder, with nothing after them."""
    pipe = _graph(setup, lambda image: [image])
    while True:
        yield pipe.run()


def _graph(setup: LoaderSetup, make_outputs: Callable[["types.DataNode"], list["types.DataNode"]]) -> Pipeline:
    """Build a pipeline that reads and decodes the shards in random order and passes the images to `make_outputs`."""
    tars = sorted(map(str, setup.folder.glob("*.tar")))

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        encoded = fn.readers.webdataset(paths=tars, ext=[EXTENSIONS], random_shuffle=True)
        device = "mixed" if setup.device == "gpu" else "cpu"
        return tuple(make_outputs(fn.decoders.image(encoded, device=device, output_type=types.RGB)))

    device_id = 0 if setup.device == "gpu" else None
    return graph(batch_size=setup.batch_size, num_threads=setup.threads, device_id=device_id, prefetch_queue_depth=2, seed=1)


def _native_crop(image: "types.DataNode", recipe: ViewRecipe, offset: list[float], scale: list[float]) -> "types.DataNode":
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
    if recipe.blur_prob > 0:
        if _coin(recipe.blur_prob):
            crop = fn.gaussian_blur(crop, sigma=_uniform(*recipe.blur_sigma))
    if recipe.solarize_prob > 0:
        if _coin(recipe.solarize_prob):
            crop = fn.lookup_table(crop, keys=list(range(256)), values=SOLARIZED, dtype=types.UINT8)
    flip = fn.random.coin_flip(probability=recipe.flip_prob)  # the operator takes an int32
    return fn.crop_mirror_normalize(crop, dtype=types.FLOAT, output_layout="CHW", mirror=flip, mean=offset, std=scale)


def _coin(probability: float) -> "types.DataNode":
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _uniform(low: float, high: float) -> "types.DataNode":
    return fn.random.uniform(range=(low, high))


def torchvision_pil(setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    """Yield crops of Pillow images by torchvision's v1 transforms, composed as in the loaders of DINOv2 and DINOv3."""
    return _load(setup, v1, [v1.ToTensor()], lambda encoded: Image.open(io.BytesIO(encoded)).convert("RGB"))


def torchvision_v2(setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    """Yield crops of tensors by transforms v2, in uint8 until the last step: the fast way according to its documentation."""

    def decode(encoded: bytes) -> torch.Tensor:
        return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)

    return _load(setup, v2, [v2.ToDtype(torch.float32, scale=True)], decode)


class CroppedSamples(Dataset):
    """The crops of each sample: every transform applied to the decoded image."""

    def __init__(self, index: ShardIndex, decode: Callable[[bytes], Any], transforms: Sequence[Any]) -> None:
        self.index, self.decode, self.transforms = index, decode, transforms

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[torch.Tensor]:
        image = self.decode(self.index.encoded(row))
        return [transform(image) for transform in self.transforms]


def _load(
    setup: LoaderSetup, tv: ModuleType, to_float: list[Any], decode: Callable[[bytes], Any]
) -> Iterator[Sequence[torch.Tensor]]:
    dataset = build_multicrop_dataset("custom", setup.folder)
    last = [*to_float, tv.Normalize(dataset.mean, dataset.std)]
    transforms = [_transform(tv, recipe, last) for recipe in dataset.recipes]
    order = np.random.default_rng(0).permutation(len(dataset.index)).tolist()
    loader: DataLoader = DataLoader(
        CroppedSamples(dataset.index, decode, transforms),
        setup.batch_size,
        sampler=itertools.cycle(order),
        num_workers=setup.threads,  # each runs torch on one thread
        multiprocessing_context="fork",
    )
    yield from loader


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
