"""Which members of a WebDataset tar make up one sample, and what its label is: one rule for converting, indexing and training."""

import io
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.files import read_bytes
from pipeline.shards.index_file import FAULTS, SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.side_folders import MASK_END, folder_of_images
from pipeline.shards.tar import CONVERTIBLE, IMAGE_EXTENSIONS, TarMember, is_hidden, sample_key, tar_kind, tar_members, warn_once
from pipeline.text import plural

HEAD_BYTES = 1 << 14  # of an image: mostly enough to know its size in pixels
Label = int | str
MAX_LABEL_BYTES = 1 << 24
MAX_LABEL = 1 << 24  # more classes than any set of images has; above it, a label is an identifier
NUMBERS = re.compile(r"[\s\0[]*-?\d+(?:(?:\s*[,;]\s*|\s+)-?\d+)*[\s\0\]]*")  # `3`, `[3]`, `3 17 20`, `[3, 17]`
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_id", "cls", "target", "category", "y")  # of columns
ORPHANS, STRAYS = "cls members without an image", "json members without an image"
# `k.image.jpg` is the image of a sample that also has `k.depth.png`.
IMAGE_PARTS = ("image", "img", "jpg", "rgb", "input", "photo")


class _Labels:
    """The `cls` and `json` members of a tar, read only for the keys of images. `refused`: what is no label in them, and where."""

    def __init__(self, path: Path, members: Iterable[TarMember]) -> None:
        self._path, self._labels, self.refused = path, dict[str, list[Label]](), list[str]()
        self._members: dict[str, dict[str, list[TarMember]]] = {"cls": {}, "json": {}}
        for member in members:
            key, extension = sample_key(member.name)
            if extension in self._members:
                self._members[extension].setdefault(key, []).append(member)

    def of(self, key: str) -> list[Label]:
        """Return the labels with a key, those in `cls` before those in `json`; joined tars can have several of one name."""
        if key not in self._labels:
            kinds = (kind.get(key, ()) for kind in self._members.values())
            found = ([label for member in kind if (label := self._read(member)) is not None] for kind in kinds)
            self._labels[key] = next(filter(None, found), [])
        return self._labels[key]

    def unused(self, extension: str) -> list[str]:
        """Return the names of the `cls` or `json` members that were never asked for: they belong to no image."""
        return [member.name for key, kind in self._members[extension].items() if key not in self._labels for member in kind]

    def _read(self, member: TarMember) -> Label | None:
        """Return the label in a `cls` member, or in a `json` member or its `label`; None where there is none."""
        content = read_bytes(self._path, member.offset, min(member.size, MAX_LABEL_BYTES))
        try:
            value = content.decode("utf-8-sig") if sample_key(member.name)[1] == "cls" else json.loads(content)
            value = value.get("label") if isinstance(value, dict) else value
            return None if value is None else label_of(value)
        except (ValueError, RecursionError):
            self.refused.append(f"{content[:40]!r} in {member.name}")
            return None


def label_of(value: Any) -> Label:
    """Return 2 for `2`, `2.0`, `"2"`, `[2]` and `"[2]"`, and other text, the name of a class. Raises ValueError for all else."""
    if isinstance(value, str) and NUMBERS.fullmatch(value):
        value = re.findall(r"-?\d+", value)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not one number or one name")
    text = value.strip("\0 \t\r\n") if isinstance(value, str) else ""
    try:
        number = float(text or value)
    except ValueError:
        if not text or not text.isprintable():
            raise
        return text
    if not -1 <= number < MAX_LABEL or number != int(number):
        raise ValueError(f"{value!r} is no integer of -1..{MAX_LABEL - 1:,}")
    return int(number)


def describe_left_out(names: dict[str, list[str]]) -> str:
    """Return one line on what `match_labels` left out, "" for nothing."""
    kinds = [f"{kind} ({len(some):,}, such as {some[0]})" for kind, some in names.items() if some]
    return f"left out: {', '.join(kinds)}" if kinds else ""


def match_labels(
    path: Path, images: Sequence[TarMember], members: Iterable[TarMember]
) -> tuple[list[tuple[TarMember, Label]], dict[str, list[str]]]:
    """Return the image and the label, UNLABELLED for none, of each sample; and the names of what is left out, by kind.

    A label is found by its image's name: `k.cls` belongs to `k.jpg`, else to `k.image.jpg` or any other `k.*.jpg`. Where `k.jpg`
    and `k.seg.png` share a label, the second is a part of the first one's sample. Raises ValueError where it is not clear which
    image is meant, and where one name has several labels.
    """
    labels, assigned, parts = _Labels(path, members), dict[int, Label](), set[int]()
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))  # the images of a key, by name
    for number, image in enumerate(images):
        key = sample_key(image.name)[0]
        while key and not labels.of(key):  # the longest of `a/b.c.d`, `a/b.c`, `a/b` that is the key of a label
            shorter = sample_key(key)[0]
            key = "" if shorter == key or shorter.endswith("/") else shorter
        if key:
            groups[key][image.name].append(number)
    for key, names in groups.items():
        chosen = _image_of(key, list(names), path)
        parts |= {number for name, numbers in names.items() if name != chosen for number in numbers}
        numbers, values = names[chosen], labels.of(key)
        if len(values) != len(numbers):
            if len(set(values)) > 1:
                many = f"{len(values)} labels for {len(numbers)} images"
                raise ValueError(f"{path}: {many} with the key {key!r}: remove some")
            values = values[:1] * len(numbers)
        assigned |= zip(numbers, values, strict=True)
    left_out = {
        "further images of samples": [images[number].name for number in sorted(parts)],
        ORPHANS: labels.unused("cls"),
        STRAYS: labels.unused("json"),
        "what is not one number or one name": labels.refused,
    }
    return [(image, assigned.get(n, UNLABELLED)) for n, image in enumerate(images) if n not in parts], left_out


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
    """Index one foreign WebDataset tar: `[n]` of SAMPLE_DTYPE, by offset, as `match_labels` labels it. Raises ValueError."""
    shown = [member for member in tar_members(path) if not is_hidden(member.name)]
    members = [member for member in shown if not member.name.lower().endswith(MASK_END)]
    if len(members) < len(shown):
        warn_once(f"{path}: {plural(len(shown) - len(members), 'mask')} (*{MASK_END}) left out")
    images = [member for member in members if sample_key(member.name)[1] in IMAGE_EXTENSIONS]
    others = Counter(extension for member in members if (extension := sample_key(member.name)[1]) in CONVERTIBLE)
    left = ", ".join(f"{count:,} .{extension}" for extension, count in others.most_common())
    advice = f"`python tools/make_shards.py convert {path.parent} --out SHARDS` reads them too"
    if not images:
        what = f"{left} images and no jpg, jpeg or png: {advice}" if left else "no jpg, jpeg or png: not a WebDataset of images"
        raise ValueError(f"{path}: {tar_kind(path)}, {what}")
    if left:
        warn_once(f"{path}: {left} images next to {len(images):,} jpg, jpeg or png are left out: {advice}")
    if below := folder_of_images([member.name for member in images]):
        num_all, images = len(images), [member for member in images if member.name.startswith(below)]
        warn_once(f"{path}: {num_all - len(images):,} images next to {below}, such as masks, are left out")
    samples, left_out = match_labels(path, images, members)
    if note := describe_left_out(left_out):
        warn_once(f"{path}: {note}")
    if name := next((label for _, label in samples if isinstance(label, str)), ""):
        warn_once(f"{path}: labels that are names ({name!r}, ...) are left out: `make_shards.py convert` numbers them")
    rows = [
        (shard, image.offset, image.size, label if isinstance(label, int) else UNLABELLED, *_image_size(path, image))
        for image, label in samples
    ]
    return np.array(sorted(rows, key=itemgetter(1)), SAMPLE_DTYPE)  # hard links name earlier bytes


def _image_size(path: Path, member: TarMember) -> tuple[int, int]:
    """Return height and width. Reads the complete image only where its head does not tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for num_bytes in (HEAD_BYTES, member.size):
            try:
                return Image.open(io.BytesIO(read_bytes(path, member.offset, min(num_bytes, member.size)))).size[::-1]
            except FAULTS as error:
                reason = str(error)
    raise ValueError(f"{path}: {member.name} at byte {member.offset} is not an image ({reason})")
