"""One shard: tar, DALI index and record. The same conversion writes the same bytes on any machine."""

import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np

from pipeline.shards.index import SAMPLE_DTYPE, UNLABELLED
from pipeline.shards.index_file import DAMAGES
from tools.shards.catalogue import Source
from tools.shards.images import CheckedImage, ImagePolicy, check_image

BLOCK = 512
RECORD_FOLDER, IDENTITY_NAME = ".records", "plan.json"
# Mean and std are those of every 128th image, as decoding all would cost more than the conversion; in small sets of 256 or more.
PIXEL_STRIDE, PIXEL_IMAGES = 128, 256
FULL_BATCH = 32


@dataclass(frozen=True)
class Conversion:
    """Which image goes to which shard of a split.

    `order`: catalogue rows in stored order; shard k holds `order[starts[k]:starts[k + 1]]`.
    """

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

    def record_path(self, shard: int) -> Path:
        return self.folder / RECORD_FOLDER / f"{shard:06d}.npz"


@dataclass
class ShardRecord:
    """What is known of a written shard without reading it. `rows`: `[n]` of SAMPLE_DTYPE."""

    rows: np.ndarray
    fingerprints: np.ndarray
    sha256: str
    idx_sha256: str
    num_bytes: int
    rejected: list[dict[str, str | int]]
    changes: dict[str, int]
    pixels: list[list[int]]

    def save(self, path: Path) -> None:
        meta = {name: value for name, value in vars(self).items() if name not in ("rows", "fingerprints")}
        buffer = io.BytesIO()
        np.savez(buffer, rows=self.rows, fingerprints=self.fingerprints, meta=np.array(json.dumps(meta)))
        write_file(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "ShardRecord":
        """Raises ValueError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return ShardRecord(file["rows"], file["fingerprints"], **json.loads(str(file["meta"])))
        except DAMAGES as error:
            again = "Remove it and run the same command again: its shard is then written anew"
            raise ValueError(f"{path}: damaged ({error or type(error).__name__}). {again}") from None


class PartialFile:
    """A file that appears under its name only when it is complete and on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.descriptor = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.num_bytes = 0

    def write(self, chunks: list[bytes]) -> None:
        total = sum(map(len, chunks))
        written = os.writev(self.descriptor, chunks)
        if written < total:
            rest = memoryview(b"".join(chunks))[written:]
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        self.num_bytes += total

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.descriptor)
                self.partial.rename(self.path)
        finally:
            os.close(self.descriptor)
            self.partial.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with PartialFile(path) as file:
        file.write([content])


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header (POSIX.1-1988) of a regular file, with nothing that changes from run to run."""
    fields = b"%-100b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00        0" % (b"", size)
    fields = name.encode("ascii").ljust(100, b"\0") + fields[100:]
    block = fields.ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(329, b"\0") + b"0000000\x000000000\x00"
    checksum = b"%06o\0 " % sum(block)
    return (block[:148] + checksum + block[156:]).ljust(BLOCK, b"\0")


def idx_content(samples: list[list[tuple[str, int, int, str]]]) -> bytes:
    """DALI's `v1.2` index: per sample `extension offset size name` of each member."""
    lines = (" ".join(" ".join(map(str, member)) for member in members) for members in samples)
    return "\n".join([f"v1.2 {len(samples)}", *lines, ""]).encode("utf-8", "surrogateescape")


def pixel_stride(num_images: int) -> int:
    return max(1, min(PIXEL_STRIDE, num_images // PIXEL_IMAGES))


def fingerprint(content: bytes) -> bytes:
    """16 bytes from the length and three pieces of an image; where two are equal, the images are compared in full."""
    middle = len(content) // 2
    pieces = content[:1024] + content[middle : middle + 1024] + content[-1024:]
    return hashlib.blake2b(pieces, digest_size=16, key=len(content).to_bytes(8, "little")).digest()


class ShardBuilder:
    """Writes samples one after another and collects what the record and the index need."""

    def __init__(self, conversion: Conversion, shard: int, file: PartialFile) -> None:
        self.conversion, self.shard, self.file = conversion, shard, file
        self.digest = hashlib.sha256()
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.fingerprints: list[bytes] = []
        self.idx: list[list[tuple[str, int, int, str]]] = []
        self.changes: Counter[str] = Counter()
        self.pixels = np.zeros(7, np.int64)

    def add(self, position: int, image: CheckedImage) -> None:
        catalogue, row = self.conversion.source.catalogue, int(self.conversion.order[position])
        key, label = f"{position:09d}", catalogue.label[row]
        parts = {image.extension: image.content}
        if label != UNLABELLED:
            parts["cls"] = b"%d" % label
        origin = {"name": catalogue.name(row)} | ({"changes": image.changes} if image.changes else {})
        parts["json"] = json.dumps(origin, ensure_ascii=True).encode()
        offset, chunks, idx = self.file.num_bytes + BLOCK, [], []
        self.rows.append((self.shard, offset, len(image.content), label, image.height, image.width))
        for extension, content in parts.items():
            name, padding = f"{key}.{extension}", -len(content) % BLOCK
            chunks += [tar_header(name, len(content)), content, bytes(padding)]
            idx.append((extension, offset, len(content), name))
            offset += len(content) + padding + BLOCK
        self._write(chunks)
        self.idx.append(idx)
        self.fingerprints.append(fingerprint(image.content))
        self.changes.update(image.changes)
        if image.sums is not None:
            self.pixels += image.sums

    def finish(self, rejected: list[dict[str, str | int]]) -> ShardRecord:
        self._write([bytes(2 * BLOCK)])
        return ShardRecord(
            rows=np.array(self.rows, SAMPLE_DTYPE),
            fingerprints=np.frombuffer(b"".join(self.fingerprints), "S16"),
            sha256=self.digest.hexdigest(),
            idx_sha256=hashlib.sha256(idx_content(self.idx)).hexdigest(),
            num_bytes=self.file.num_bytes,
            rejected=rejected,
            changes=dict(sorted(self.changes.items())),
            pixels=[part.tolist() for part in np.split(self.pixels, (1, 4))],
        )

    def _write(self, chunks: list[bytes]) -> None:
        self.file.write(chunks)
        for chunk in chunks:
            self.digest.update(chunk)


class SharedCounts:
    """Images, bytes and rejects so far, shared by all processes; also how the parent asks them to stop."""

    def __init__(self, context: BaseContext) -> None:
        self._numbers = context.Array("q", 4)

    def add(self, images: int, num_bytes: int, rejects: int) -> None:
        with self._numbers.get_lock():
            if self._numbers[3]:
                raise InterruptedError("stopped")
            for place, more in enumerate((images, num_bytes, rejects)):
                self._numbers[place] += more

    def totals(self) -> tuple[int, int, int]:
        images, num_bytes, rejects = self._numbers[:3]
        return images, num_bytes, rejects

    def stop(self) -> None:
        self._numbers[3] = 1


def write_shard(conversion: Conversion, shard: int, counts: SharedCounts) -> ShardRecord:
    """Write one shard, replacing what is there."""
    path, catalogue = conversion.folder / conversion.shard_name(shard), conversion.source.catalogue
    rejected: list[dict[str, str | int]] = []
    with PartialFile(path) as file:
        builder = ShardBuilder(conversion, shard, file)
        start, stop = int(conversion.starts[shard]), int(conversion.starts[shard + 1])
        for first in range(start, stop, FULL_BATCH):
            before = file.num_bytes, len(rejected)
            batch = range(first, min(first + FULL_BATCH, stop))
            for position, checked in zip(batch, _check_batch(conversion, batch), strict=True):
                if isinstance(checked, CheckedImage):
                    builder.add(position, checked)
                else:
                    row = int(conversion.order[position])
                    rejected.append({"name": catalogue.name(row), "label": catalogue.label[row], "reason": checked})
            counts.add(len(batch), file.num_bytes - before[0], len(rejected) - before[1])
        record = builder.finish(rejected)
    write_file(path.with_suffix(".idx"), idx_content(builder.idx))
    record.save(conversion.record_path(shard))
    return record


def _check_batch(conversion: Conversion, positions: range) -> list[CheckedImage | str]:
    stride = pixel_stride(len(conversion.order))
    results = [
        check_one(conversion, int(conversion.order[position]), with_sums=position % stride == 0)
        for position in positions
    ]
    if conversion.policy.verify == "full":
        from tools.shards.decode_check import decode_errors  # DALI takes a second to import

        images = {k: image for k, image in enumerate(results) if isinstance(image, CheckedImage)}
        errors = decode_errors([(image.content, image.height, image.width) for image in images.values()])
        for k, error in zip(images, errors, strict=True):
            results[k] = error or results[k]
    return results


def check_one(conversion: Conversion, row: int, with_sums: bool = False) -> CheckedImage | str:
    """The image as it is to be stored, or the reason to leave it out. Nothing above the limit is ever read."""
    catalogue, policy = conversion.source.catalogue, conversion.policy
    if catalogue.size[row] > policy.max_bytes:
        return f"{catalogue.size[row]:,} bytes, allowed {policy.max_bytes:,} (--max-bytes)"
    content = catalogue.read(row)
    try:
        return check_image(content, catalogue.name(row), policy, with_sums)
    except ValueError as error:
        return str(error)


def shard_is_complete(conversion: Conversion, shard: int) -> bool:
    """Whether the shard, its .idx and its record are on disk with the bytes that were written."""
    path = conversion.folder / conversion.shard_name(shard)
    try:
        record = ShardRecord.load(conversion.record_path(shard))
        with path.open("rb") as file, path.with_suffix(".idx").open("rb") as idx:
            if os.fstat(file.fileno()).st_size != record.num_bytes:
                return False
            same_idx = hashlib.file_digest(idx, "sha256").hexdigest() == record.idx_sha256
            return same_idx and hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except (OSError, ValueError):
        return False
