"""Shards of photographs with the usual size and weight of ImageNet's, for measuring where there is no ImageNet."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards.index import split_folder
from tools.shards.convert import ConvertOptions, convert
from tools.shards.layouts.source import open_source
from tools.shards.photographs import PHOTOGRAPHS, photograph_path

WIDTH, HEIGHT = 500, 375  # the usual ImageNet photograph
MAX_ENLARGEMENT = 1.3  # beyond it, pixels are smoother than a camera's
QUALITY = 97  # makes the median file about 100 KB, the weight of ImageNet's
NUM_CLASSES = 16
MEMORY_DISK = Path("/dev/shm")


def memory_folder() -> Path | None:
    """Return a folder in memory if there is one: the speed of a shared disk varies from run to run."""
    return MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None


@contextmanager
def benchmark_shards(folder: Path | None, num_images: int, workers: int, num_shards: int = 4) -> Iterator[Path]:
    """Yield the folder of the training shards in `folder` or, without it, of temporary ones with `num_images` photographs."""
    if folder:
        yield Path(split_folder("custom", folder, "train"))
        return
    with tempfile.TemporaryDirectory(dir=memory_folder()) as temporary:
        yield photograph_shards(Path(temporary), num_images, workers, num_shards)


def photograph_shards(folder: Path, num_images: int, workers: int, num_shards: int = 4) -> Path:
    """Write `num_images` photographs and their shards, and return the folder of the shards."""
    for number, content in enumerate(photographs(num_images)):
        path = folder / "source" / f"class{number % NUM_CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    options = ConvertOptions(workers=workers, num_shards=num_shards)
    convert(open_source(folder / "source", "train"), folder / "shards", "train", options)
    return folder / "shards"


def photographs(count: int) -> Iterator[bytes]:
    """Yield JPEG files of 500x375: random windows, scales and mirrorings of the sample's colour photographs."""
    rng = np.random.default_rng(0)
    images = [Image.open(photograph_path(folder, file)) for folder, file, _, _ in PHOTOGRAPHS]
    sources = [image for image in images if image.mode == "RGB" and enlargement(image) <= MAX_ENLARGEMENT]
    for number in range(count):
        encoded = io.BytesIO()
        random_window(sources[number % len(sources)], rng).save(encoded, "JPEG", quality=QUALITY, icc_profile=None)
        yield encoded.getvalue()


def enlargement(source: Image.Image) -> float:
    """Return the factor by which the photograph must grow to fill a window of 500x375."""
    return max(WIDTH / source.width, HEIGHT / source.height)


def random_window(source: Image.Image, rng: np.random.Generator) -> Image.Image:
    largest = 1 / enlargement(source)
    scale = rng.uniform(min(largest, 1.0), min(largest, 1.5))  # source pixels per pixel
    width, height = scale * WIDTH, scale * HEIGHT
    x, y = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    window = source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    return window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else window
