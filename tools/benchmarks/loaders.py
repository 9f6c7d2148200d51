"""The loaders that `bench.py pipeline` compares: ours, parts of it, and torchvision."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.crops.augment import ViewRecipe
from pipeline.crops.graph import parsed
from pipeline.dataset import MultiCropDataset
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

    @pipeline_def
    def graph() -> "types.DataNode":
        encoded = fn.readers.webdataset(paths=sorted(map(str, setup.folder.glob("*.tar"))), ext=[EXTENSIONS], dont_use_mmap=True)
        options = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        return fn.decoders.image(parsed(encoded), device="mixed" if setup.device == "gpu" else "cpu", **options)

    device_id = 0 if setup.device == "gpu" else None
    pipe = graph(batch_size=setup.batch_size, num_threads=setup.threads, device_id=device_id, prefetch_queue_depth=2, seed=1)
    while True:
        yield pipe.run()


def torchvision(setup: LoaderSetup) -> Iterator[Sequence[torch.Tensor]]:
    """Yield crops by torchvision's transforms v2 on uint8 tensors, the fast way by its documentation, in a DataLoader."""
    samples = CroppedSamples(build_multicrop_dataset("custom", setup.folder))
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    yield from DataLoader(
        samples,
        setup.batch_size,
        sampler=itertools.cycle(order),
        num_workers=setup.threads,  # each runs torch on one thread
        multiprocessing_context="fork",
    )


class CroppedSamples(Dataset):
    """The crops of each sample: every transform applied to the decoded image."""

    def __init__(self, dataset: MultiCropDataset) -> None:
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
        self.index, self.transforms = dataset.index, [v2.Compose([*_steps(recipe), *last]) for recipe in dataset.recipes]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[torch.Tensor]:
        encoded = torch.frombuffer(bytearray(self.index.encoded(row)), dtype=torch.uint8)
        image = decode_image(encoded, ImageReadMode.RGB)
        return [transform(image) for transform in self.transforms]


def _steps(recipe: ViewRecipe) -> list[Any]:
    assert recipe.scale is not None
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return [
        v2.RandomResizedCrop(recipe.size, recipe.scale, recipe.ratio, v2.InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(recipe.flip_prob),
        v2.RandomApply([jitter], recipe.jitter_prob),
        v2.RandomGrayscale(recipe.gray_prob),
        v2.RandomApply([v2.GaussianBlur(BLUR_KERNEL, recipe.blur_sigma)], recipe.blur_prob),
        v2.RandomSolarize(128, recipe.solarize_prob),
    ]
