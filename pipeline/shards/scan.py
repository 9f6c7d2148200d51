"""Index a WebDataset of any writer by its tar headers and the heads of its images."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards.index_file import SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.storage import read_range
from pipeline.shards.tar import TarMember, sample_key, tar_kind, tar_members

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
HEAD_BYTES = 1 << 14  # of an image: mostly enough to know its size in pixels
MAX_LABEL_BYTES = 1 << 20


def scan_shard(path: Path, shard: int) -> np.ndarray:
    """Index one foreign WebDataset tar: `[n]` of SAMPLE_DTYPE, in the order of the images in the tar.

    The image is the member whose extension is jpg, jpeg or png in any case; the label is that of `read_label`, or UNLABELLED.
    Members of one sample need not be adjacent. Raises ValueError for a tar without images.
    """
    images: dict[str, tuple[int, int, int, int]] = {}
    labels: dict[str, int] = {}
    for member in tar_members(path):
        key, extension = sample_key(member.name)
        if extension in IMAGE_EXTENSIONS:
            width, height = _image_size(path, member)
            images[key] = (member.offset, member.size, height, width)
        elif (label := read_label(path, member)) is not None and (extension == "cls" or key not in labels):
            labels[key] = label
    if not images:
        raise ValueError(f"{path}: {tar_kind(path)}, no jpg, jpeg or png members: not a WebDataset of images")
    rows = [(shard, offset, size, labels.get(key, UNLABELLED), h, w) for key, (offset, size, h, w) in images.items()]
    return np.array(rows, SAMPLE_DTYPE)


def _image_size(path: Path, member: TarMember) -> tuple[int, int]:
    """Width and height; the whole image is read only where its head does not tell."""
    fault: Exception | None = None
    for num_bytes in (HEAD_BYTES, member.size):
        try:
            head = read_range(str(path), member.offset, min(num_bytes, member.size))
            return Image.open(io.BytesIO(head)).size
        except (OSError, ValueError, SyntaxError) as error:
            fault = error
    raise ValueError(f"{path}: {member.name} at byte {member.offset} is not an image ({fault})")


def read_label(path: Path, member: TarMember) -> int | None:
    """The label in a `cls` member (a number) or a `json` member (a number, or `label` of an object); None if there is none.

    Raises ValueError for one that cannot be parsed.
    """
    extension = sample_key(member.name)[1]
    if extension not in ("cls", "json") or member.size > MAX_LABEL_BYTES:
        return None
    content = read_range(str(path), member.offset, member.size)
    try:
        value = int(content) if extension == "cls" else json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{path}: {member.name} at byte {member.offset} holds {content[:40]!r}, which is no label: cls holds a number, "
            "json an object. Fix the data set or leave it out"
        ) from None
    if isinstance(value, dict):
        value = value.get("label")
    return value if isinstance(value, int) and -(1 << 31) <= value < 1 << 31 else None
