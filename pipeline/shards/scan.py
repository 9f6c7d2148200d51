"""Index a WebDataset of any writer by its tar headers and the heads of its images."""

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from pipeline.shards.index_file import SAMPLE_DTYPE, UNLABELLED

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
LONGEST_PADDING = 1 << 20  # bytes of zeros that a tar may end with: writers fill up a record, of 10 KB mostly


def scan_shard(path: Path, shard: int) -> np.ndarray:
    """Index one foreign WebDataset tar: `[n]` of SAMPLE_DTYPE, in the order of the images in the tar.

    The image is the member whose extension is jpg, jpeg or png in any case; the label is a `cls` member, or `label` in a
    `json` member, or UNLABELLED. Members of one sample need not be adjacent. Raises ValueError for a tar without images.
    """
    images: dict[str, tuple[int, int, int, int]] = {}
    labels: dict[str, int] = {}
    for key, extension, member, content in _members(path):
        if extension in IMAGE_EXTENSIONS:
            place = f"{path}: {key}.{extension} at byte {member.offset_data}"
            try:
                # Pillow reads as far as the size is known, mostly a few KB.
                width, height = Image.open(content).size
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"{place} is not an image ({error})") from None
            images[key] = (member.offset_data, member.size, height, width)
        elif extension == "cls":
            labels[key] = _parsed(int, content.read(), f"{path}: {key}.cls")
        elif extension == "json":
            fields = _parsed(json.loads, content.read(), f"{path}: {key}.json")
            label = fields.get("label") if isinstance(fields, dict) else None
            if isinstance(label, int):
                labels.setdefault(key, label)
    if not images:
        raise ValueError(f"{path}: {tar_kind(path)}, no jpg, jpeg or png members: not a WebDataset of images")
    rows = [(shard, offset, size, labels.get(key, UNLABELLED), h, w) for key, (offset, size, h, w) in images.items()]
    return np.array(rows, SAMPLE_DTYPE)


def _parsed(parse: Callable[[bytes], Any], content: bytes, place: str) -> Any:
    try:
        return parse(content)
    except ValueError:
        raise ValueError(
            f"{place} holds {content[:40]!r}, not a label. Fix the data set or leave this sample out"
        ) from None


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, IO[bytes]]]:
    """Key, extension in lower case, header and content of each member that matters."""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.rpartition(".")
                extension = extension.lower()
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path}: ends inside {member.name}: truncated. Copy it again")
                if member.isreg() and extension in IMAGE_EXTENSIONS | {"cls", "json"}:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield f"{folder}/{stem}", extension, member, file
            if size - tar.offset > LONGEST_PADDING:
                raise ValueError(f"{path}: zeros at byte {tar.offset:,} of {size:,}: damaged. Copy it again")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: {tar_kind(path)}, not a readable tar ({error}). Copy it again") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions") from None


def tar_kind(path: Path) -> str:
    """A description of what a file called .tar really is."""
    with path.open("rb") as file:
        return head_kind(file.read(tarfile.BLOCKSIZE))


def head_kind(head: bytes) -> str:
    """The same, from the file's first 512 bytes."""
    if not head:
        return "empty"
    if head.startswith(b"\x1f\x8b"):
        return "compressed with gzip (`gunzip` it)"
    if not any(head):
        return "zero-filled, whole or at its head"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "not a tar"
    return "a tar"
