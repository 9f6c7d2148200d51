"""One shard: tar, DALI index and record, the same bytes for the same plan on any machine."""

import hashlib
import io
import json
import os
import zipfile
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np

from pipeline.shards.index import SAMPLE_DTYPE, UNLABELLED
from tools.shards.catalogue import Source
from tools.shards.images import CheckedImage, ImagePolicy, check_image, pixel_sums

BLOCK = 512
RECORD_FOLDER = ".records"
# Mean and std come from every 128th image, as decoding all would cost more than the conversion; of small sets from 256 or more.
PIXEL_STRIDE, PIXEL_IMAGES = 128, 256
FULL_BATCH = 32


@dataclass(frozen=True)
class ShardPlan:
    """Which image goes where. `order`: catalogue rows in stored order; shard k holds `order[starts[k]:starts[k + 1]]`."""

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
    """What is known of a written shard without reading it again. `rows`: `[n]` of SAMPLE_DTYPE."""

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
        with np.load(path, allow_pickle=False) as file:
            return ShardRecord(file["rows"], file["fingerprints"], **json.loads(str(file["meta"])))


class PartialFile:
    """A file that appears under its name only when it is whole and on disk."""

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
    """Write a small file beside and rename it."""
    with PartialFile(path) as file:
        file.write([content])


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header of a regular file with nothing in it that changes from run to run (POSIX.1-1988, `ustar`)."""
    fields = b"%-100b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00        0" % (b"", size)
    fields = name.encode("ascii").ljust(100, b"\0") + fields[100:]
    block = fields.ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(329, b"\0") + b"0000000\x000000000\x00"
    checksum = b"%06o\0 " % sum(block)
    return (block[:148] + checksum + block[156:]).ljust(BLOCK, b"\0")


def member(name: str, content: bytes) -> list[bytes]:
    return [tar_header(name, len(content)), content, bytes(-len(content) % BLOCK)]


def pixel_stride(num_images: int) -> int:
    return max(1, min(PIXEL_STRIDE, num_images // PIXEL_IMAGES))


def fingerprint(content: bytes) -> bytes:
    """16 bytes that tell images apart: length and three pieces. Equal ones are compared in full before they count."""
    middle = len(content) // 2
    pieces = content[:1024] + content[middle : middle + 1024] + content[-1024:]
    return hashlib.blake2b(pieces, digest_size=16, key=len(content).to_bytes(8, "little")).digest()


class ShardBuilder:
    """Writes samples one after another and remembers what it wrote."""

    def __init__(self, plan: ShardPlan, shard: int, file: PartialFile) -> None:
        self.plan, self.shard, self.file = plan, shard, file
        self.digest = hashlib.sha256()
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.fingerprints: list[bytes] = []
        self.idx_lines: list[str] = []
        self.changes: Counter[str] = Counter()
        self.pixels: list[list[int]] = [[0], [0, 0, 0], [0, 0, 0]]

    def add(self, position: int, image: CheckedImage) -> None:
        row = int(self.plan.order[position])
        source = self.plan.source
        label = source.catalogue.label[row]
        key = f"{position:09d}"
        origin = {"name": source.catalogue.name(row)} | ({"changes": image.changes} if image.changes else {})
        parts = {image.extension: image.content}
        if label != UNLABELLED:
            parts["cls"] = b"%d" % label
        parts["json"] = json.dumps(origin, ensure_ascii=True).encode()
        offset, chunks, idx = self.file.num_bytes, [], []
        for extension, content in parts.items():
            chunks += member(f"{key}.{extension}", content)
            idx.append(f"{extension} {offset + BLOCK} {len(content)} {key}.{extension}")
            offset += BLOCK + len(content) + -len(content) % BLOCK
        self.rows.append(
            (self.shard, self.file.num_bytes + BLOCK, len(image.content), label, image.height, image.width)
        )
        self._write(chunks)
        self.idx_lines.append(" ".join(idx))
        self.fingerprints.append(fingerprint(image.content))
        self.changes.update(image.changes)
        if position % pixel_stride(len(self.plan.order)) == 0:
            count, sums, squares = pixel_sums(image.content)
            for total, new in zip(self.pixels, ([count], sums, squares), strict=True):
                total[:] = [a + b for a, b in zip(total, new, strict=True)]

    def finish(self, rejected: list[dict[str, str | int]]) -> ShardRecord:
        self._write([bytes(2 * BLOCK)])
        return ShardRecord(
            rows=np.array(self.rows, SAMPLE_DTYPE),
            fingerprints=np.frombuffer(b"".join(self.fingerprints), "S16"),
            sha256=self.digest.hexdigest(),
            idx_sha256=hashlib.sha256(self.idx()).hexdigest(),
            num_bytes=self.file.num_bytes,
            rejected=rejected,
            changes=dict(sorted(self.changes.items())),
            pixels=self.pixels,
        )

    def idx(self) -> bytes:
        """DALI's `v1.2` index: per sample `extension offset size name` of each member."""
        return "\n".join([f"v1.2 {len(self.idx_lines)}", *self.idx_lines, ""]).encode()

    def _write(self, chunks: list[bytes]) -> None:
        self.file.write(chunks)
        for chunk in chunks:
            self.digest.update(chunk)


class Tally:
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


def write_shard(plan: ShardPlan, shard: int, tally: Tally) -> ShardRecord:
    """Write one shard, replacing what is there."""
    path = plan.folder / plan.shard_name(shard)
    rejected: list[dict[str, str | int]] = []
    with PartialFile(path) as file:
        builder = ShardBuilder(plan, shard, file)
        start, stop = int(plan.starts[shard]), int(plan.starts[shard + 1])
        for first in range(start, stop, FULL_BATCH):
            before = file.num_bytes, len(rejected)
            batch = range(first, min(first + FULL_BATCH, stop))
            for position, outcome in zip(batch, _check_batch(plan, batch), strict=True):
                if isinstance(outcome, CheckedImage):
                    builder.add(position, outcome)
                else:
                    row = int(plan.order[position])
                    label = plan.source.catalogue.label[row]
                    rejected.append({"name": plan.source.catalogue.name(row), "label": label, "reason": outcome})
            tally.add(len(batch), file.num_bytes - before[0], len(rejected) - before[1])
        record = builder.finish(rejected)
    write_file(path.with_suffix(".idx"), builder.idx())
    record.save(plan.record_path(shard))
    return record


def _check_batch(plan: ShardPlan, positions: range) -> list[CheckedImage | str]:
    outcomes = [check_one(plan, int(plan.order[position])) for position in positions]
    if plan.policy.verify == "full":
        from tools.shards.decode_check import decode_errors  # DALI takes a second to import: only when asked for

        good = [k for k, outcome in enumerate(outcomes) if isinstance(outcome, CheckedImage)]
        images = [outcome for outcome in outcomes if isinstance(outcome, CheckedImage)]
        errors = decode_errors([(image.content, image.height, image.width) for image in images])
        for k, error in zip(good, errors, strict=True):
            outcomes[k] = error or outcomes[k]
    return outcomes


def check_one(plan: ShardPlan, row: int) -> CheckedImage | str:
    """The image as it is to be stored, or the reason to leave it out. Nothing above the limit is ever read."""
    catalogue = plan.source.catalogue
    if catalogue.size[row] > plan.policy.max_bytes:
        return f"{catalogue.size[row]:,} bytes, allowed {plan.policy.max_bytes:,} (--max-bytes)"
    content = catalogue.read(row)
    try:
        return check_image(content, catalogue.name(row), plan.policy)
    except ValueError as error:
        return str(error)


def shard_is_whole(plan: ShardPlan, shard: int) -> bool:
    """Whether the shard, its .idx and its record are on disk with the bytes that were written."""
    path = plan.folder / plan.shard_name(shard)
    try:
        record = ShardRecord.load(plan.record_path(shard))
        with path.open("rb") as file, path.with_suffix(".idx").open("rb") as idx:
            if os.fstat(file.fileno()).st_size != record.num_bytes:
                return False
            same_idx = hashlib.file_digest(idx, "sha256").hexdigest() == record.idx_sha256
            return same_idx and hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return False
