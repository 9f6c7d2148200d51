"""The content of a source: one row per image, and how to read the bytes of that image."""

import copy
import hashlib
import math
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import read_bytes
from tools.shards.decoding.pixels import encode

MAX_SAMPLES = 1 << 31  # labels, shards and rows are int32 in the index
LARGEST_HELD_OUT = 10  # images of a group of copies


@dataclass
class LooseFiles:
    """Images in files of their own below `root`."""

    root: Path

    def read(self, offset: int, size: int, name: str) -> bytes:
        return read_bytes(self.root / name, 0, size)


@dataclass
class FileRanges:
    """Images that are byte ranges of one file, such as a tar or a tar inside it; read in place, never extracted."""

    path: Path

    def read(self, offset: int, size: int, name: str) -> bytes:
        content = read_bytes(self.path, offset, size)
        if len(content) != size:
            end = offset + len(content)
            raise ValueError(f"{self.path}: ends at byte {end}, inside {name}: truncated. Copy it again")
        return content


@dataclass
class ImageArray:
    """Pixels in memory, `[N, H, W]` or `[N, H, W, 3]` uint8, returned as PNG. `offset` is the row."""

    pixels: np.ndarray

    def read(self, offset: int, size: int, name: str) -> bytes:
        return encode(Image.fromarray(self.pixels[offset]))


Container = LooseFiles | FileRanges | ImageArray


class Catalogue:
    """All images of one split, in the fixed order of the source."""

    def __init__(self, containers: Sequence[Container]) -> None:
        self.containers = containers
        self.container, self.label = array("i"), array("i")
        self.offset, self.size = array("q"), array("q")
        self.names: list[str] = []

    @staticmethod
    def of_pixels(pixels: np.ndarray, labels: Sequence[int], names: Iterable[str] = ()) -> "Catalogue":
        """Build a catalogue of `[N, H, W]` or `[N, H, W, 3]` uint8; images without names are named by their row."""
        catalogue, size = Catalogue([ImageArray(pixels)]), math.prod(pixels.shape[1:])
        names = names or (f"{row:06d}" for row in range(len(labels)))
        for row, (label, name) in enumerate(zip(labels, names, strict=True)):
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
        self.names.append(name)

    def subset(self, rows: Iterable[int]) -> "Catalogue":
        """Return some of the images, in the order of `rows`; the containers are shared."""
        part = Catalogue(self.containers)
        for row in rows:
            part.add(self.container[row], self.offset[row], self.size[row], self.label[row], self.names[row])
        return part

    def read(self, row: int) -> bytes:
        return self.containers[self.container[row]].read(self.offset[row], self.size[row], self.names[row])

    def digest(self) -> str:
        """Return what the shards depend on: order, sizes, labels and names, but not where the source is stored."""
        digest = hashlib.sha256(self.size.tobytes())
        digest.update(self.label.tobytes())
        digest.update("".join(self.names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """One split of a data set as it is on disk."""

    layout: str
    name: str
    catalogue: Catalogue
    classes: tuple[str, ...] = ()  # by label: a wnid, the name of a folder; empty for unlabelled data
    attributions: tuple[dict[str, str], ...] = ()  # origin and licence of the images, where known
    notes: tuple[str, ...] = ()  # how the source is read; "" says nothing
    skipped: Counter[str] = field(default_factory=Counter)  # the files that are not images, by kind
    copies: tuple[tuple[str, ...], ...] = ()  # the names in each group of near-equal images, where those were looked for

    def relabelled(self, labels: Iterable[int], classes: tuple[str, ...], *notes: str) -> "Source":
        """Return the source with other labels, one per image, and further notes."""
        catalogue = copy.copy(self.catalogue)
        catalogue.label = array("i", labels)
        return replace(self, catalogue=catalogue, classes=classes, notes=(*self.notes, *notes))


def hold_out(source: Source, first: np.ndarray, ratio: float, seed: int) -> tuple[Source, Source]:
    """Split by `seed`: val gets `ratio` of each class. `first`: of each image, the first of its group, which stays together.

    A group of more than LARGEST_HELD_OUT stays in train: in val it would be one answer that counts so often.
    """
    total, names = len(source.catalogue), source.catalogue.names
    # Sort by class, then at random, and take the images at which the running share of R passes a whole number.
    rows, sizes = np.unique(first, return_counts=True)
    rows, draws = rows[sizes <= LARGEST_HELD_OUT], np.random.Philox(key=[seed, 1]).random_raw(total)
    by_class = rows[np.lexsort((draws[rows], np.asarray(source.catalogue.label)[rows]))]
    steps = np.floor(np.arange(len(rows) + 1) * ratio)
    is_val = np.zeros(total, bool)
    is_val[by_class] = steps[1:] > steps[:-1]
    is_val = is_val[first]
    if is_val.all() or not is_val.any():
        raise ValueError(f"--val-ratio {ratio} of {total:,} images leaves a split empty: choose another, or add images")
    copies = defaultdict[int, list[str]](list)
    for row in np.flatnonzero(np.bincount(first, minlength=total)[first] > 1).tolist():
        copies[int(first[row])].append(names[row])

    def part(is_ours: np.ndarray) -> Source:
        groups = tuple(tuple(group) for row, group in copies.items() if is_ours[row])
        return replace(source, catalogue=source.catalogue.subset(np.flatnonzero(is_ours).tolist()), copies=groups)

    return part(~is_val), part(is_val)


def normalized_name(name: str) -> str:
    """Return a class name without case, outer spaces or Unicode form: macOS and Linux write one accented name in two forms."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def check_class_names(names: Iterable[str], where: str) -> None:
    """Raise ValueError when two classes have the same normalized name."""
    seen: dict[str, str] = {}
    for name in names:
        if (key := normalized_name(name)) in seen:
            raise ValueError(f"{where}: two classes with one name, {seen[key]!r} and {name!r}: rename or merge one of them")
        seen[key] = name
