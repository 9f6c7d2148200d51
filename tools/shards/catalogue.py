"""What a source holds: one row per image, and how to read that image's bytes."""

import hashlib
import math
import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from tools.shards.images import encode_png

MAX_SAMPLES = 1 << 31  # labels, shards and rows are int32 in the index


class Container(Protocol):
    """A place that images are read from."""

    def read(self, offset: int, size: int, name: str) -> bytes: ...


@dataclass
class LooseFiles:
    """Images that are files of their own below `root`."""

    root: Path

    def read(self, offset: int, size: int, name: str) -> bytes:
        with open(f"{self.root}/{name}", "rb", buffering=0) as file:
            return file.read(size)


@dataclass
class FileRanges:
    """Images that are byte ranges of one file (a tar, a nested tar, a spool): read in place, never extracted."""

    path: Path
    _descriptor: int = field(default=-1, repr=False)

    def read(self, offset: int, size: int, name: str) -> bytes:
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            end = offset + len(content)
            raise ValueError(f"{self.path}: ends at byte {end}, inside {name}: truncated. Copy it again")
        return content


@dataclass
class ImageArray:
    """Raw pixels in memory, `[N, H, W]` or `[N, H, W, 3]` uint8, returned as PNG. `offset` is the row."""

    pixels: np.ndarray

    def read(self, offset: int, size: int, name: str) -> bytes:
        return encode_png(self.pixels[offset])


class Catalogue:
    """All images of one split, in the source's own fixed order. About 40 bytes each, so 1.3 M images take 50 MB."""

    def __init__(self, containers: list[Container] | None = None) -> None:
        self.containers: list[Container] = containers or []
        self.container = array("i")
        self.offset = array("q")
        self.size = array("q")
        self.label = array("i")
        self._names = bytearray()
        self._name_ends = array("q")

    @staticmethod
    def of_pixels(pixels: np.ndarray, labels: list[int], names: Iterable[str] = ()) -> "Catalogue":
        """Images of `[N, H, W]` or `[N, H, W, 3]` uint8; named by their row unless names are given."""
        catalogue, size = Catalogue([ImageArray(pixels)]), math.prod(pixels.shape[1:])
        for row, (label, name) in enumerate(
            zip(labels, names or (f"{row:06d}" for row in range(len(labels))), strict=True)
        ):
            catalogue.add(0, row, size, label, name)
        return catalogue

    def __len__(self) -> int:
        return len(self.container)

    def add(self, container: int, offset: int, size: int, label: int, name: str) -> None:
        if len(self) >= MAX_SAMPLES:
            raise ValueError(f"the source holds more than {MAX_SAMPLES:,} images: split it into several sets")
        self.container.append(container)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)
        self._names += name.encode("utf-8", "surrogateescape")
        self._name_ends.append(len(self._names))

    def subset(self, rows: Iterable[int]) -> "Catalogue":
        """Some of the images, in the order of `rows`; the containers are shared."""
        part = Catalogue(self.containers)
        for row in rows:
            part.add(self.container[row], self.offset[row], self.size[row], self.label[row], self.name(row))
        return part

    def name(self, row: int) -> str:
        start = self._name_ends[row - 1] if row else 0
        return self._names[start : self._name_ends[row]].decode("utf-8", "surrogateescape")

    def read(self, row: int) -> bytes:
        return self.containers[self.container[row]].read(self.offset[row], self.size[row], self.name(row))

    def num_bytes(self, max_bytes: int) -> int:
        """The size of all images that are not above the limit."""
        return sum(size for size in self.size if size <= max_bytes)

    def digest(self) -> str:
        """What the shards depend on: order, sizes, labels and names, but not where the source lies."""
        digest = hashlib.sha256(self.size.tobytes())
        digest.update(self.label.tobytes())
        digest.update(self._names)
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """One split of a data set as found on disk.

    `classes[label]` is the class's identifier (a wnid, a folder name); empty for unlabelled data. `attributions` lists the
    origin and licence of the images where known. `notes` says what was found and how it was read, `skipped` counts the files
    that are not images by kind.
    """

    layout: str
    name: str
    catalogue: Catalogue
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    attributions: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)


def hold_out(source: Source, ratio: float, seed: int) -> tuple[Source, Source]:
    """Train and val: `ratio` of every class's images, chosen by `seed`, are val. Raises ValueError when one would be empty."""
    total = len(source.catalogue)
    draws = np.random.Philox(key=[seed, 1]).random_raw(total)
    by_class = np.lexsort((draws, np.asarray(source.catalogue.label)))
    steps = np.floor(np.arange(total + 1) * ratio)
    is_val = np.zeros(total, bool)
    is_val[by_class] = steps[1:] > steps[:-1]
    if is_val.all() or not is_val.any():
        raise ValueError(f"--val-ratio {ratio} of {total:,} images leaves a split empty: choose another, or add images")
    train, val = (
        replace(source, catalogue=source.catalogue.subset(np.flatnonzero(rows).tolist())) for rows in (~is_val, is_val)
    )
    return train, val


def check_class_names(names: list[str], where: str) -> None:
    """Raise ValueError when two classes have one name (compared without case, spaces at the ends or Unicode form)."""
    seen: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name).strip().casefold()
        if plain in seen:
            both = f"{seen[plain]!r} and {name!r}"
            raise ValueError(f"{where}: two classes with one name, {both}: rename or merge one of them")
        seen[plain] = name


def check_labels(labels: np.ndarray, classes: list[str], where: str) -> None:
    """Raise ValueError for a label without a class."""
    if classes and len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"{where}: labels {labels.min()}..{labels.max()} for {len(classes)} classes: wrong archive")
