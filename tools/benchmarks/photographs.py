"""Shards of photographs of ImageNet's usual size and weight, for measuring where there is no ImageNet."""

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
MOST_ENLARGED = 1.3  # beyond it the pixels are smoother than a camera's
QUALITY = 97  # makes the median file about 100 KB, which is what ImageNet's weigh
NUM_CLASSES = 16
EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png"}
SHARED_MEMORY = Path("/dev/shm")


def memory_folder() -> Path | None:
    """A folder in memory where there is one: a shared disk is not what is to be measured, and varies from run to run."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None


@contextmanager
def benchmark_shards(given: Path | None, num_images: int, workers: int, num_shards: int = 4) -> Iterator[Path]:
    """The folder of the training shards in `given` or, without it, of temporary ones with `num_images` photographs."""
    if given:
        yield Path(split_folder("custom", given, "train"))
        return
    with tempfile.TemporaryDirectory(dir=memory_folder()) as temporary:
        yield photograph_shards(Path(temporary), num_images, workers, num_shards=num_shards)


def photograph_shards(folder: Path, num_images: int, workers: int, kind: str = "JPEG", num_shards: int = 4) -> Path:
    """Write `num_images` photographs and their shards; returns the folder of the shards."""
    for number, content in enumerate(photographs(num_images, kind)):
        path = folder / "source" / f"class{number % NUM_CLASSES:02d}" / f"{number:06d}{EXTENSIONS[kind]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    shards = folder / "shards"
    options = ConvertOptions(workers=workers, num_shards=num_shards)
    convert(open_source(folder / "source", "train"), shards, "train", options)
    return shards


def photographs(count: int, kind: str = "JPEG") -> Iterator[bytes]:
    """JPEG (or PNG) files of 500x375: windows of the sample's colour photographs, each at a scale of its own, mirrored or not."""
    rng = np.random.default_rng(0)
    sources = [source for source in _colour_photographs() if _enlargement(source) <= MOST_ENLARGED]
    for number in range(count):
        encoded = io.BytesIO()
        _cut(sources[number % len(sources)], rng).save(encoded, kind, quality=QUALITY, icc_profile=None)
        yield encoded.getvalue()


def _colour_photographs() -> list[Image.Image]:
    images = [Image.open(photograph_path(folder, file)) for folder, file, _, _ in PHOTOGRAPHS]
    return [image for image in images if image.mode == "RGB"]


def _enlargement(source: Image.Image) -> float:
    """How much a window that fits the whole photograph would have to grow."""
    return max(WIDTH / source.width, HEIGHT / source.height)


def _cut(source: Image.Image, rng: np.random.Generator) -> Image.Image:
    largest = 1 / _enlargement(source)
    scale = rng.uniform(min(largest, 1.0), min(largest, 1.5))  # source pixels per pixel
    width, height = scale * WIDTH, scale * HEIGHT
    x, y = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    window = source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    return window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else window
