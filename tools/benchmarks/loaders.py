"""The loaders that `bench.py pipeline` compares: ours, parts of it, and torchvision."""

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.crops.augment import ViewRecipe
from pipeline.crops.graph import parsed
from pipeline.defaults import HW_DECODER_LOAD
from pipeline.order import BatchStart
from pipeline.shards.index import ShardIndex
from pipeline.window import Fed, feed, make_batch, plan_window
from tools.benchmarks.measure import LoaderSetup

EXTENSIONS = "jpg;jpeg;png;JPEG;JPG;PNG"
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


def decode_only(setup: LoaderSetup) -> Iterator[Sequence[Any]]:
    """Yield the output of DALI's reader and decoder, with the options of our graph and nothing after them."""
    decoder = {"device": "mixed", "hw_decoder_load": HW_DECODER_LOAD} if setup.device == "gpu" else {"device": "cpu"}

    @pipeline_def
    def graph() -> "types.DataNode":
        encoded = fn.readers.webdataset(paths=sorted(map(str, setup.folder.glob("*.tar"))), ext=[EXTENSIONS], dont_use_mmap=True)
        options = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        return fn.decoders.image(parsed(encoded), **options, **decoder)

    device_id = 0 if setup.device == "gpu" else None
    pipe = graph(batch_size=setup.batch_size, num_threads=setup.threads, device_id=device_id, prefetch_queue_depth=2, seed=1)
    while True:
        yield pipe.run()


# In place of the GPU's kernel: it makes nothing, on a device that has done everything.
DONE = SimpleNamespace(query=lambda: True, synchronize=lambda: None)
NO_KERNEL: Any = SimpleNamespace(device=torch.device("cpu"), shared_limit=1 << 30, launch=lambda *_: None, mark=lambda: DONE)


def gpu_host(setup: LoaderSetup) -> Iterator[Sequence[Any]]:
    """Yield batches of the GPU's kernel, for which the host does all but decode and launch; their crops are never made."""
    from pipeline.crops.fused import FusedCrops

    dataset, images = build_multicrop_dataset("custom", setup.folder), next(decode_only(setup))
    loader = build_multicrop_dataloader(dataset, setup.batch_size, device="cpu", num_workers=setup.threads)
    crops, fed = FusedCrops([recipe.size for recipe in dataset.recipes], NO_KERNEL), deque[Fed]()
    starts, rows = plan_window(loader.sequence, BatchStart(0, 0), None)
    while True:
        for _ in feed(loader.sequence, dataset.recipes, starts, rows, fed):
            yield make_batch(dataset.index, fed.popleft(), images, crops, NO_KERNEL.device).crops


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
