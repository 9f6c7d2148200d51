"""Shards of photographs with the usual size and weight of ImageNet's, for measuring where there is no ImageNet."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.shards.index import split_folder
from tools.shards.convert import convert
from tools.shards.layouts.source import open_source
from tools.shards.photographs import PHOTOGRAPHS, photograph_path
from tools.shards.writer import Conversion

SIZE = np.array([500, 375])  # width and height of the usual ImageNet photograph
QUALITY = 97  # makes the median file about 100 KB, the weight of ImageNet's
NUM_CLASSES, NUM_SHARDS = 16, 4
MEMORY_DISK = Path("/dev/shm")  # if there is one: the speed of a shared disk varies from run to run


@contextmanager
def benchmark_shards(folder: Path | None, num_images: int, workers: int) -> Iterator[Path]:
    """Yield the folder of the training shards in `folder` or, without it, of temporary ones with `num_images` photographs."""
    if folder:
        yield Path(split_folder("custom", folder, "train"))
        return
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None) as temporary:
        source, shards = Path(temporary, "source"), Path(temporary, "shards")
        write_photographs(source, num_images)
        convert(Conversion(open_source(source, "train", shards), shards, "train", workers=workers, num_shards=NUM_SHARDS))
        yield shards


def write_photographs(folder: Path, count: int) -> None:
    """Write class folders of 500x375 JPEGs: random windows, scales and mirrorings of the sample's colour photographs."""
    rng = np.random.default_rng(0)
    images = [Image.open(photograph_path(package, file)) for package, file, _, _ in PHOTOGRAPHS]
    images = [image for image in images if image.mode == "RGB"]
    for number in range(count):
        image, path = images[number % len(images)], folder / f"class{number % NUM_CLASSES:02d}" / f"{number:06d}.jpg"
        largest = (image.size / SIZE).min()  # source pixels per pixel
        window = rng.uniform(min(largest, 1.0), min(largest, 1.5)) * SIZE
        corner = rng.uniform((0, 0), image.size - window)
        picture = image.resize(tuple(SIZE.tolist()), Image.Resampling.BICUBIC, (*corner, *(corner + window)))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = ImageOps.mirror(picture) if rng.random() < 0.5 else picture
        picture.save(path, "JPEG", quality=QUALITY, icc_profile=None)
