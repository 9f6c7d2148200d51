"""Index a WebDataset of any writer by its tar headers and the heads of its images."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards.index_file import SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.samples import LabelMembers, match_labels
from pipeline.shards.storage import read_range
from pipeline.shards.tar import TarMember, is_hidden, sample_key, tar_kind, tar_members, warn_once

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
HEAD_BYTES = 1 << 14  # of an image: mostly enough to know its size in pixels
# What Pillow raises for damaged images, whatever its documentation says: RuntimeError (AVIF), TypeError (TIFF), and more.
PILLOW_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


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
    matches = match_labels(names, members.by_key(), path)
    matches.warn(path, names)
    rows = []
    for number, (member, label) in enumerate(zip(images, matches.labels, strict=True)):
        if isinstance(label, str):
            warn_once(
                f"{path}: labels that are names ({label!r}, ...) are left out: `make_shards.py convert` numbers them"
            )
        if number not in matches.parts:
            width, height = _image_size(path, member)
            stored = label if isinstance(label, int) else UNLABELLED
            rows.append((shard, member.offset, member.size, stored, height, width))
    return np.array(sorted(rows, key=lambda row: row[1]), SAMPLE_DTYPE)  # a link's content lies before it


def _image_size(path: Path, member: TarMember) -> tuple[int, int]:
    """Width and height; the whole image is read only where its head does not tell."""
    fault: Exception | None = None
    for num_bytes in (HEAD_BYTES, member.size):
        try:
            head = read_range(str(path), member.offset, min(num_bytes, member.size))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return Image.open(io.BytesIO(head)).size
        except PILLOW_FAULTS as error:
            fault = error
    raise ValueError(f"{path}: {member.name} at byte {member.offset} is not an image ({fault})")
