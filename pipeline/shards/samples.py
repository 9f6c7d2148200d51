"""Which members of a WebDataset tar make up one sample, and what its label is: one rule for converting, indexing and training."""

import io
import json
import struct
import warnings
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.shards.index_file import SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.storage import read_bytes
from pipeline.shards.tar import IMAGE_EXTENSIONS, TarMember, is_hidden, sample_key, tar_kind, tar_members, warn_once

HEAD_BYTES = 1 << 14  # of an image: mostly enough to know its size in pixels
# Everything that Pillow raises for damaged images, despite its documentation: RuntimeError (AVIF), TypeError (TIFF), and more.
PILLOW_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
Label = int | str
MAX_LABEL_BYTES = 1 << 24
MAX_LABEL = 1 << 24  # more classes than any set of images has; above it, a label is an identifier
# `k.image.jpg` is the image of a sample that also has `k.depth.png`.
IMAGE_PARTS = ("image", "img", "jpg", "rgb", "input", "photo")


class LabelMembers:
    """The labels of one tar by the key of their member: in the order of the members where a name occurs more than once."""

    def __init__(self) -> None:
        self._labels: dict[str, dict[str, list[Label]]] = {"json": {}, "cls": {}}

    def add(self, path: Path, member: TarMember) -> None:
        """Take the label of a `cls` or `json` member; other members are passed over."""
        key, extension = sample_key(member.name)
        if extension in self._labels and (label := read_label(path, member, extension)) is not None:
            self._labels[extension].setdefault(key, []).append(label)

    def by_key(self) -> dict[str, list[Label]]:
        """Return all labels; that of a sample with both is the one in `cls`."""
        return self._labels["json"] | self._labels["cls"]


def read_label(path: Path, member: TarMember, extension: str) -> Label | None:
    """Return the label in a `cls` member, or in a `json` member or its `label`; None where there is none.

    Raises ValueError for one that cannot be parsed.
    """
    where = f"{path}: {member.name} at byte {member.offset}"
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{where}: a label of {member.size:,} bytes, allowed {MAX_LABEL_BYTES:,}: leave it out")
    content = read_bytes(path, member.offset, member.size)
    try:
        value = content.decode("utf-8-sig") if extension == "cls" else json.loads(content)
        value = value.get("label") if isinstance(value, dict) else value
        if isinstance(value, list | dict):
            warn_once(f"{path}: labels that are no number or text, as in {member.name}, are left out")
            return None
        return value if value is None else label_of(value)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where} holds {content[:40]!r}, which is no label: allowed are numbers of 0..{MAX_LABEL - 1:,}, -1 for "
            "none, or the name of a class; in json they are the value or its `label`. Fix the data set or leave it out"
        ) from None


def label_of(value: float | str) -> Label:
    """Return 2 for `2`, `2.0` and `"2"`, and other text, the name of a class, without blanks. Raises ValueError."""
    text = value.strip("\0 \t\r\n") if isinstance(value, str) else ""
    try:
        number = float(text) if isinstance(value, str) else value
    except ValueError:
        if not text or not text.isprintable():
            raise
        return text
    if not -1 <= number < MAX_LABEL or number != int(number):
        raise ValueError(f"{value!r} is no integer of -1..{MAX_LABEL - 1:,}")
    return int(number)


class Matches(NamedTuple):
    """`labels`: of each image, None where it has none. `parts`: the images that are a further part of another one's sample.

    `orphans`: the keys of labels that belong to no image.
    """

    labels: list[Label | None]
    parts: set[int]
    orphans: list[str]


def orphan_note(count: int) -> str:
    return f"{count:,} label member{'s'[: count > 1]} (cls or json) belong{'s'[count > 1 :]} to no image"


def match_labels(images: Sequence[str], labels: dict[str, list[Label]], path: Path) -> Matches:
    """Find each image's label by its name: `k.cls` belongs to `k.jpg`, else to `k.image.jpg` or any other `k.*.jpg`.

    Where `k.jpg` and `k.seg.png` share a label, the second is a part of the first one's sample. Raises ValueError where it
    is not clear which image is meant, and where one name has several labels.
    """
    assigned: list[Label | None] = [None] * len(images)
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))  # the images of a key, by name
    for number, name in enumerate(images if labels else ()):
        if owner := _owner(sample_key(name)[0], labels):
            groups[owner][name].append(number)
    parts = set[int]()
    for key, names in groups.items():
        chosen = _image_of(key, list(names), path)
        parts |= {number for name, numbers in names.items() if name != chosen for number in numbers}
        numbers, values = names[chosen], labels[key]
        if len(values) != len(numbers):
            if len(set(values)) > 1:
                many = f"{len(values)} labels for {len(numbers)} images"
                raise ValueError(f"{path}: {many} with the key {key!r}: remove some")
            values = values[:1] * len(numbers)
        for number, value in zip(numbers, values, strict=True):
            assigned[number] = value
    return Matches(assigned, parts, [key for key in labels if key not in groups])


def _owner(key: str, labels: dict[str, list[Label]]) -> str:
    """Return the longest of `a/b.c.d`, `a/b.c`, `a/b` that is the key of a label, or ""."""
    while key and key not in labels:
        shorter = sample_key(key)[0]
        key = "" if shorter == key or shorter.endswith("/") else shorter
    return key


def _image_of(key: str, names: list[str], path: Path) -> str:
    """Return the image that the label `key` is for: the one with that very key, else the one that is called an image."""
    exact = [name for name in names if sample_key(name)[0] == key]
    called = [name for part in IMAGE_PARTS for name in names if sample_key(name)[0] == f"{key}.{part}"]
    candidates = exact or called[:1] or names
    if len(candidates) > 1:
        both = " and ".join(candidates[:2])
        raise ValueError(f"{path}: two images with the key {key!r}, {both}: re-key or remove one of them")
    return candidates[0]


def scan_shard(path: Path, shard: int) -> np.ndarray:
    """Index one foreign WebDataset tar: `[n]` of SAMPLE_DTYPE, in the order of the images in the tar.

    The images are the members whose extension is jpg, jpeg or png in any case, hidden ones left out; their labels are those of
    `match_labels`, or UNLABELLED. Members of one sample need not be adjacent. Raises ValueError for a tar without images.
    """
    images: list[TarMember] = []
    members = LabelMembers()
    for member in tar_members(path):
        if is_hidden(member.name):
            continue
        if sample_key(member.name)[1] in IMAGE_EXTENSIONS:
            images.append(member)
        else:
            members.add(path, member)
    if not images:
        raise ValueError(f"{path}: {tar_kind(path)}, no jpg, jpeg or png members: not a WebDataset of images")
    names = [member.name for member in images]
    labels, parts, orphans = match_labels(names, members.by_key(), path)
    if parts:
        warn_once(f"{path}: {len(parts):,} images are further parts of samples and left out ({names[min(parts)]}, ...)")
    if orphans:
        warn_once(f"{path}: {orphan_note(len(orphans))} (the first: {orphans[0]})")
    rows = []
    for number, (member, label) in enumerate(zip(images, labels, strict=True)):
        if isinstance(label, str):
            warn_once(f"{path}: labels that are names ({label!r}, ...) are left out: `make_shards.py convert` numbers them")
        if number not in parts:
            width, height = _image_size(path, member)
            stored = label if isinstance(label, int) else UNLABELLED
            rows.append((shard, member.offset, member.size, stored, height, width))
    return np.array(rows, SAMPLE_DTYPE)


def _image_size(path: Path, member: TarMember) -> tuple[int, int]:
    """Return width and height. Reads the complete image only where its head does not tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for num_bytes in (HEAD_BYTES, member.size):
            try:
                return Image.open(io.BytesIO(read_bytes(path, member.offset, min(num_bytes, member.size)))).size
            except PILLOW_FAULTS as error:
                reason = str(error)
    raise ValueError(f"{path}: {member.name} at byte {member.offset} is not an image ({reason})")
