"""Writes one shard and its record. The same conversion writes the same bytes on every machine."""

import hashlib
import io
import json
import math
from collections import Counter
from ctypes import c_char
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np

from pipeline.files import file_checksum, partial_file, write_atomic
from pipeline.shards.index import SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.index_file import FAULTS
from tools.shards.catalogue import Source
from tools.shards.images import CheckedImage, ImagePolicy, check_image

RECORD_FOLDER, IDENTITY_NAME = ".records", "plan.json"
# A shard is large enough for sequential reads from a store, and small enough to be cached and written again.
SHARD_BYTES, SHARD_SAMPLES = 256 << 20, 10_000
MAX_REASON_BYTES = 500
Reject = dict[str, str | int]  # name, label and reason


@dataclass(frozen=True)
class Conversion:
    """A split to convert, and how. Shard k holds the catalogue rows `order[starts[k]:starts[k + 1]]`, of all images shuffled."""

    source: Source
    folder: Path
    split: str
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    seed: int = 0
    num_shards: int = 0  # 0: of about 256 MiB or 10,000 images each; their sizes differ by at most one
    max_bad_fraction: float = 0.01
    workers: int = 1

    @cached_property
    def order(self) -> np.ndarray:
        # Raw Philox output, unlike `permutation`, is guaranteed to stay the same in every numpy release.
        return np.argsort(np.random.Philox(key=self.seed).random_raw(len(self.source.catalogue)), kind="stable")

    @cached_property
    def starts(self) -> np.ndarray:
        total, sizes = len(self.source.catalogue), self.source.catalogue.size
        num_bytes = sum(size for size in sizes if size <= self.policy.max_bytes)
        usual = max(math.ceil(num_bytes / SHARD_BYTES), math.ceil(total / SHARD_SAMPLES))
        count = min(self.num_shards or usual, total)
        return np.arange(count + 1) * total // count

    @property
    def prefix(self) -> str:
        return f"{self.source.name}-{self.split}"

    @property
    def shards(self) -> range:
        return range(len(self.starts) - 1)

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"{self.prefix}-{shard:06d}.tar"

    def record_path(self, shard: int) -> Path:
        return self.folder / RECORD_FOLDER / f"{shard:06d}.npz"


@dataclass
class ShardRecord:
    """All that is known of a finished shard without reading it. `rows`: `[n]` of SAMPLE_DTYPE; `digests`: of the images."""

    rows: np.ndarray
    digests: np.ndarray
    sha256: str
    num_bytes: int
    rejected: list[Reject]
    changes: dict[str, int]
    one_colour: list[str]

    def save(self, path: Path) -> None:
        meta = {name: value for name, value in vars(self).items() if name not in ("rows", "digests")}
        buffer = io.BytesIO()
        np.savez(buffer, rows=self.rows, digests=self.digests, meta=np.array(json.dumps(meta)))
        write_atomic(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "ShardRecord":
        """Raises ValueError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return ShardRecord(file["rows"], file["digests"], **json.loads(str(file["meta"])))
        except FAULTS as error:
            remedy = "Remove it and run the same command again, which writes its shard again"
            raise ValueError(f"{path}: damaged ({error or type(error).__name__}). {remedy}") from None


def tar_header(name: str, size: int) -> bytes:
    """Build the USTAR header of a file without owner and time; TarInfo.tobuf takes five times as long and varies with Python."""
    head = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0%011o\0" % (size, 0)
    tail = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(72, b"\0") + 2 * b"0000000\0"
    checksum = sum(head) + sum(tail) + sum(b" " * 8)  # as if its own field were blank
    return (head + b"%06o\0 " % checksum + tail).ljust(BLOCKSIZE, b"\0")


def tar_sample(key: str, name: str, label: int, image: CheckedImage) -> bytes:
    """Build the members of one sample, which share a key in a WebDataset; the image comes first."""
    parts = {image.extension: image.content}
    if label != UNLABELLED:
        parts["cls"] = b"%d" % label
    origin = {"name": name} | ({"changes": image.changes} if image.changes else {})
    parts["json"] = json.dumps(origin, ensure_ascii=True).encode()
    return b"".join(
        tar_header(f"{key}.{extension}", len(content)) + content + bytes(-len(content) % BLOCKSIZE)
        for extension, content in parts.items()
    )


class SharedCounts:
    """Images, bytes and rejects so far and the first reject, shared by all processes; the parent also uses it to stop them."""

    def __init__(self, context: BaseContext) -> None:
        self.totals, self.first, self.stop = context.Array("q", 3), context.Array(c_char, MAX_REASON_BYTES), context.Event()

    def add(self, images: int, num_bytes: int, rejected: list[Reject]) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")
        with self.totals.get_lock():
            self.totals[:] = np.add(self.totals[:], (images, num_bytes, len(rejected))).tolist()
            if rejected and not self.first.value:
                text = f"{rejected[0]['name']}: {rejected[0]['reason']}"
                self.first.value = text.encode(errors="backslashreplace")[:MAX_REASON_BYTES]


def write_shard(conversion: Conversion, shard: int, counts: SharedCounts) -> None:
    """Write one shard and its record, replacing existing ones."""
    catalogue, digest, changes = conversion.source.catalogue, hashlib.sha256(), Counter[str]()
    rows, digests, one_colour, rejected = [], [], [], list[Reject]()
    path = conversion.shard_path(shard)
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)  # left by a killed run; a file for each kill could fill the disk
    with partial_file(path) as file:
        for position in range(int(conversion.starts[shard]), int(conversion.starts[shard + 1])):
            row, start = int(conversion.order[position]), file.tell()
            name, label, image = catalogue.names[row], catalogue.label[row], check_row(conversion, row)
            if isinstance(image, str):
                rejected.append({"name": name, "label": label, "reason": image})
                counts.add(1, 0, rejected[-1:])
                continue
            sample = tar_sample(f"{position:09d}", name, label, image)
            file.write(sample)
            digest.update(sample)
            rows.append((shard, start + BLOCKSIZE, len(image.content), label, image.height, image.width))
            digests.append(hashlib.sha256(image.content).digest()[:16])
            one_colour += [name] * image.has_one_colour
            changes.update([*image.changes, *["frames left out"] * image.other_frames])
            counts.add(1, len(sample), [])
        file.write(end := bytes(2 * BLOCKSIZE))
        digest.update(end)
        num_bytes = file.tell()
    images = np.array(rows, SAMPLE_DTYPE), np.frombuffer(b"".join(digests), "S16")
    record = ShardRecord(*images, digest.hexdigest(), num_bytes, rejected, changes, one_colour)
    record.save(conversion.record_path(shard))


def check_row(conversion: Conversion, row: int) -> CheckedImage | str:
    """Return one image as it is to be stored, or the reason to leave it out. Files above the limit are never read."""
    catalogue, policy = conversion.source.catalogue, conversion.policy
    if catalogue.size[row] > policy.max_bytes:
        return f"{catalogue.size[row]:,} bytes, allowed {policy.max_bytes:,} "
    content = catalogue.read(row)
    try:
        return check_image(content, catalogue.names[row], policy)
    except ValueError as error:
        return str(error)


def complete_shard(conversion: Conversion, counts: SharedCounts, shard: int) -> bool:
    """Write a shard unless it and its record are on disk as they were written; returns True if it had to be written."""
    try:
        record = ShardRecord.load(conversion.record_path(shard))
        is_intact = file_checksum(conversion.shard_path(shard)) == record.sha256
    except (OSError, ValueError):
        is_intact = False
    if is_intact:
        counts.add(len(record.rows) + len(record.rejected), 0, record.rejected)
    else:
        write_shard(conversion, shard, counts)
    return not is_intact
