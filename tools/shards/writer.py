"""Writes one shard and its record. The same conversion writes the same bytes on every machine."""

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO

import numpy as np

from pipeline.files import file_checksum, partial_file, write_atomic
from pipeline.shards.index import SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.index_file import DAMAGES
from tools.shards.catalogue import Source
from tools.shards.images import CheckedImage, ImagePolicy, check_image

RECORD_FOLDER, IDENTITY_NAME = ".records", "plan.json"
# Mean and std come from every 128th image, because decoding all would cost more than the conversion; small sets use at least 256.
PIXEL_STRIDE, MIN_PIXEL_IMAGES = 128, 256
BATCH_IMAGES = 32  # as many as DALI decodes at once with --verify full


@dataclass(frozen=True)
class Conversion:
    """Which image goes to which shard: shard k holds the catalogue rows `order[starts[k]:starts[k + 1]]`."""

    source: Source
    folder: Path
    prefix: str
    order: np.ndarray
    starts: np.ndarray
    policy: ImagePolicy

    @property
    def num_shards(self) -> int:
        return len(self.starts) - 1

    def shard_name(self, shard: int) -> str:
        return f"{self.prefix}-{shard:06d}.tar"

    def shard_size(self, shard: int) -> int:
        """Return the number of images that are assigned to the shard."""
        return int(self.starts[shard + 1] - self.starts[shard])

    def record_path(self, shard: int) -> Path:
        return self.folder / RECORD_FOLDER / f"{shard:06d}.npz"


@dataclass
class ShardRecord:
    """All that is known of a finished shard without reading it. `rows`: `[n]` of SAMPLE_DTYPE; `digests`: of the images."""

    rows: np.ndarray
    digests: np.ndarray
    sha256: str
    num_bytes: int
    rejected: list[dict[str, str | int]]
    changes: dict[str, int]
    pixels: list[list[int]]
    one_colour: list[str] = field(default_factory=list)

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
        except DAMAGES as error:
            remedy = "Remove it and run the same command again, which writes its shard again"
            raise ValueError(f"{path}: damaged ({error or type(error).__name__}). {remedy}") from None


def tar_header(name: str, size: int) -> bytes:
    """Build the USTAR header (POSIX.1-1988) of a regular file, without owner or time.

    Not TarInfo.tobuf: it takes nine times as long, and its device numbers depend on the Python version.
    """
    fields = b"%-100b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00        0" % (b"", size)
    fields = name.encode("ascii").ljust(100, b"\0") + fields[100:]
    block = fields.ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(329, b"\0") + b"0000000\x000000000\x00"
    checksum = b"%06o\0 " % sum(block)
    return (block[:148] + checksum + block[156:]).ljust(BLOCKSIZE, b"\0")


def pixel_stride(num_images: int) -> int:
    return max(1, min(PIXEL_STRIDE, num_images // MIN_PIXEL_IMAGES))


class ShardBuilder:
    """Appends samples to a tar and collects the content of its record."""

    def __init__(self, conversion: Conversion, shard: int, file: BinaryIO) -> None:
        self.conversion, self.shard, self.file = conversion, shard, file
        self.digest, self.num_bytes = hashlib.sha256(), 0
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.digests: list[bytes] = []
        self.rejected: list[dict[str, str | int]] = []
        self.one_colour: list[str] = []
        self.changes: Counter[str] = Counter()
        self.pixels = np.zeros(7, np.int64)

    def add(self, position: int, checked: CheckedImage | str) -> None:
        """Append the image at `position` of the order, or record the reason why it is rejected."""
        catalogue, row = self.conversion.source.catalogue, int(self.conversion.order[position])
        name, label = catalogue.name(row), catalogue.label[row]
        if isinstance(checked, str):
            self.rejected.append({"name": name, "label": label, "reason": checked})
            return
        # WebDataset: the members of a sample share a key, here the position; the image comes first.
        parts = {checked.extension: checked.content}
        if label != UNLABELLED:
            parts["cls"] = b"%d" % label
        origin = {"name": name} | ({"changes": checked.changes} if checked.changes else {})
        parts["json"] = json.dumps(origin, ensure_ascii=True).encode()
        offset = self.num_bytes + BLOCKSIZE
        self.rows.append((self.shard, offset, len(checked.content), label, checked.height, checked.width))
        for extension, content in parts.items():
            self._write(tar_header(f"{position:09d}.{extension}", len(content)), content, bytes(-len(content) % BLOCKSIZE))
        self.digests.append(hashlib.sha256(checked.content).digest()[:16])
        self.one_colour += [name] * checked.has_one_colour
        self.changes.update(checked.changes)
        if checked.other_frames:
            self.changes["frames left out"] += checked.other_frames
        self.pixels += 0 if checked.sums is None else checked.sums

    def finish(self) -> ShardRecord:
        self._write(bytes(2 * BLOCKSIZE))  # the end of a tar
        return ShardRecord(
            rows=np.array(self.rows, SAMPLE_DTYPE),
            digests=np.frombuffer(b"".join(self.digests), "S16"),
            sha256=self.digest.hexdigest(),
            num_bytes=self.num_bytes,
            rejected=self.rejected,
            changes=dict(sorted(self.changes.items())),
            pixels=[part.tolist() for part in np.split(self.pixels, (1, 4))],
            one_colour=self.one_colour,
        )

    def _write(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self.file.write(chunk)
            self.digest.update(chunk)
            self.num_bytes += len(chunk)


class SharedCounts:
    """Images, bytes and rejects so far, shared by all processes; the parent also uses it to stop them."""

    def __init__(self, context: BaseContext) -> None:
        self.totals, self.stop = context.Array("q", 3), context.Event()

    def add(self, images: int, num_bytes: int, rejects: int) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")
        with self.totals.get_lock():
            self.totals[:] = np.add(self.totals[:], (images, num_bytes, rejects)).tolist()


def write_shard(conversion: Conversion, shard: int, counts: SharedCounts) -> None:
    """Write one shard and its record, replacing existing ones."""
    path = conversion.folder / conversion.shard_name(shard)
    with partial_file(path) as file:
        builder = ShardBuilder(conversion, shard, file)
        start, stop = int(conversion.starts[shard]), int(conversion.starts[shard + 1])
        for first in range(start, stop, BATCH_IMAGES):
            num_bytes, num_rejected = builder.num_bytes, len(builder.rejected)
            batch = range(first, min(first + BATCH_IMAGES, stop))
            for position, checked in zip(batch, _check_batch(conversion, batch), strict=True):
                builder.add(position, checked)
            counts.add(len(batch), builder.num_bytes - num_bytes, len(builder.rejected) - num_rejected)
        record = builder.finish()
    record.save(conversion.record_path(shard))


def _check_batch(conversion: Conversion, positions: range) -> list[CheckedImage | str]:
    order, stride = conversion.order, pixel_stride(len(conversion.order))
    results = [check_row(conversion, int(order[position]), position % stride == 0) for position in positions]
    if conversion.policy.verify == "full":
        from tools.shards.decode_check import decode_errors  # DALI takes a second to import

        images = {k: image for k, image in enumerate(results) if isinstance(image, CheckedImage)}
        errors = decode_errors([(image.content, image.height, image.width) for image in images.values()])
        for k, error in zip(images, errors, strict=True):
            results[k] = error or results[k]
    return results


def check_row(conversion: Conversion, row: int, with_sums: bool = False) -> CheckedImage | str:
    """Return one image as it is to be stored, or the reason to leave it out. Files above the limit are never read."""
    catalogue, policy = conversion.source.catalogue, conversion.policy
    if catalogue.size[row] > policy.max_bytes:
        return f"{catalogue.size[row]:,} bytes, allowed {policy.max_bytes:,} (--max-bytes)"
    content = catalogue.read(row)
    try:
        return check_image(content, catalogue.name(row), policy, with_sums)
    except ValueError as error:
        return str(error)


def shard_is_complete(conversion: Conversion, shard: int) -> bool:
    """Return True if the shard and its record are on disk with the bytes that were written."""
    try:
        record = ShardRecord.load(conversion.record_path(shard))
        return file_checksum(conversion.folder / conversion.shard_name(shard)) == record.sha256
    except (OSError, ValueError):
        return False
