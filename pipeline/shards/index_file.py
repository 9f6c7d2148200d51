"""The files of an index, which opens in a time that does not grow with it, and its comparison with the tars.

`index.npy` holds one row per sample and `index.json` the shards with their numbers of samples. Older conversions have an
`index.npz` with both.
"""

import hashlib
import io
import json
import os
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, InstanceOf

from pipeline.files import write_atomic
from pipeline.shards.manifest import parse_model
from pipeline.shards.storage import is_remote, join, read_file, read_range
from pipeline.shards.tar import IMAGE_EXTENSIONS, head_kind

INDEX_NAME = "index.json"
SAMPLES_NAME = "index.npy"
INDEX_FILES = (SAMPLES_NAME, INDEX_NAME)  # in the order in which they are written, copied and uploaded
OLD_INDEX_NAME = "index.npz"
UNLABELLED = -1

# One row per sample. `offset` and `size` (bytes) span the encoded image inside the tar; height and width are pixels.
SAMPLE_DTYPE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")]
)
# A larger `index.npy` (two million samples) is mapped: only the rows in use are in memory, and its checksum is not computed.
MAX_READ_BYTES = 1 << 26
CHECKSUM_BYTES = 32  # of sha256
# What numpy and zipfile raise for a damaged `.npz`.
DAMAGES = (
    EOFError, LookupError, MemoryError, NotImplementedError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
BLOCK = tarfile.BLOCKSIZE
MAX_USTAR_NAME = 90  # characters: writers cut longer names off in the header, at 100 bytes or before
CHECK_THREADS = 16  # a network file system answers many requests at once; on a local disk threads cost nothing


class IndexContent(BaseModel):
    """The content of `index.json`. `shards`: the number of samples by name, in order. `checksum`: of both files."""

    checksum: InstanceOf[str]
    shards: dict[InstanceOf[str], Annotated[int, Field(ge=0, strict=True)]]


def save_index(folder: Path, shards: list[str], samples: np.ndarray) -> None:
    """Write the index of a folder. The same input gives the same bytes.

    `samples`: `[N]` of SAMPLE_DTYPE, ordered by shard and, inside a shard, by offset.
    """
    counts = np.bincount(samples["shard"], minlength=len(shards)).tolist()
    write_index(folder, dict(zip(shards, counts, strict=True)), samples.astype(SAMPLE_DTYPE, copy=False))


def write_index(folder: Path, shards: dict[str, int], samples: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, samples)
    checksum = _checksum(shards, file.getbuffer())
    # The checksum at the end, which numpy passes over, ties a large file to its JSON without reading all of it: a crash or
    # another writer between the two renames never leaves a pair that looks right.
    file.write(checksum)
    write_atomic(folder / SAMPLES_NAME, file.getbuffer())
    write_atomic(folder / INDEX_NAME, json.dumps({"checksum": checksum.hex(), "shards": shards}, indent=1) + "\n")
    (folder / OLD_INDEX_NAME).unlink(missing_ok=True)


def _checksum(shards: dict[str, int], array_file: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(json.dumps(shards).encode())
    digest.update(array_file)
    return digest.digest()


def load_index(folder: Path | str, remedy: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return the names of the shards, the samples `[N]` and the number of samples per shard, `[num_shards] int64`.

    Raises FileNotFoundError without an index, ValueError that ends with `remedy` for a damaged one, StoreError.
    """
    place = join(folder, INDEX_NAME)
    try:
        content = parse_model(IndexContent, read_file(place), place, remedy)
    except FileNotFoundError:
        place = join(folder, OLD_INDEX_NAME)
        names, samples, counts = _load_old(place, remedy)
    else:
        names, counts = tuple(content.shards), np.array([*content.shards.values()], np.int64)
        place = join(folder, SAMPLES_NAME)
        samples = _load_samples(place, content, remedy)
    if problem := _problem(names, samples, counts):
        raise ValueError(f"{place}: {problem}. {remedy}")
    return names, samples, counts


def _load_samples(place: str, content: IndexContent, remedy: str) -> np.ndarray:
    mapped = False
    try:
        if not is_remote(place) and (mapped := os.path.getsize(place) > MAX_READ_BYTES):
            checksum = read_range(place, os.path.getsize(place) - CHECKSUM_BYTES, CHECKSUM_BYTES)
        else:
            data = read_file(place)
            checksum = _checksum(content.shards, data[:-CHECKSUM_BYTES])
    except FileNotFoundError:
        raise ValueError(f"{place}: missing, and {INDEX_NAME} is there. {remedy}") from None
    try:
        if checksum.hex() == content.checksum:
            return np.asarray(np.load(place, mmap_mode="r") if mapped else np.load(io.BytesIO(data)))
    except DAMAGES:  # of the header of a mapped file
        pass
    raise ValueError(f"{place}: damaged, or not of the {INDEX_NAME} next to it. {remedy}")


def _load_old(place: str, remedy: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    data = read_file(place)
    try:
        with np.load(io.BytesIO(data)) as arrays:
            shards, samples = arrays["shards"], arrays["samples"]
            if shards.dtype.kind != "U" or shards.ndim != 1:
                raise ValueError(f"shards is {shards.dtype} {shards.shape}")
            # The first version has no counts.
            counts = arrays["counts"] if "counts" in arrays else np.bincount(samples["shard"], minlength=len(shards))
            return tuple(shards.tolist()), samples, counts
    except DAMAGES as error:
        raise ValueError(f"{place}: damaged, or not an index ({error or type(error).__name__}). {remedy}") from None


def _problem(names: tuple[str, ...], samples: np.ndarray, counts: np.ndarray) -> str | None:
    if samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        return f"samples is {samples.dtype} {samples.shape}; expected is one row per sample of {SAMPLE_DTYPE.names}"
    if counts.shape != (len(names),) or counts.dtype != np.int64 or counts.min(initial=0) < 0:
        return f"{len(names)} shards, but counts of {len(counts)}"
    if counts.sum() != len(samples):
        return f"{len(samples)} samples, but counts of {counts.sum()}"
    return None if len(samples) else "lists no samples"


def first_and_last(samples: np.ndarray, counts: np.ndarray, place: str, remedy: str) -> dict[int, np.ndarray]:
    """Return `[2]` of SAMPLE_DTYPE for each shard with samples. Raises ValueError for an index not ordered by shard."""
    used = np.flatnonzero(counts)
    stops = np.cumsum(counts)[used]
    ends = samples[np.stack([stops - counts[used], stops - 1], axis=1)]  # [shards, 2]
    is_sane = (ends["shard"] == used[:, None]) & (ends["offset"] >= BLOCK) & (ends["offset"] % BLOCK == 0)
    if not (is_sane & (ends["size"] >= 0)).all():
        raise ValueError(f"{place}: damaged, or not ordered by shard. {remedy}")
    return dict(zip(used.tolist(), ends, strict=True))


def check_shards(paths: Sequence[Path], ends: dict[int, np.ndarray]) -> None:
    """Raise ValueError for the first tar that differs from the index, with the number of others.

    Reads at most the length and three blocks of each tar. `ends`: as from `first_and_last`.
    """

    def check(shard: int) -> str | None:
        try:
            problem = shard_problem(paths[shard], ends[shard])
        except FileNotFoundError:
            return f"{paths[shard]}: listed in the index but missing. Copy it again, or rebuild the index"
        except OSError as error:
            return f"{paths[shard]}: cannot be read ({error.strerror}). Check its permissions"
        return f"{paths[shard]}: {problem}. Copy it again" if problem else None

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        problems = [problem for problem in pool.map(check, ends) if problem]
    if problems:
        more = f" ({len(problems) - 1} more shards differ from the index)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def shard_problem(path: Path, ends: np.ndarray) -> str | None:
    """Return how a tar differs from the index, judged by its length and the headers of its first and last sample."""
    with path.open("rb") as file:
        descriptor = file.fileno()
        for offset, size in zip(ends["offset"].tolist(), ends["size"].tolist(), strict=True):
            header = os.pread(descriptor, BLOCK, offset - BLOCK)
            if problem := _header_problem(header, size):
                kind = head_kind(os.pread(descriptor, BLOCK, 0))
                if kind == "a tar":
                    kind = "of another data set, or damaged" if any(header) else "zero-filled in part"
                    kind = kind if header else "truncated"
                return f"{kind}: {problem} at byte {offset - BLOCK:,}, where the index has a sample"
        size, needed = os.fstat(descriptor).st_size, int((ends["offset"] + ends["size"]).max())
    return f"{size:,} bytes, and the index needs {needed:,}: truncated" if size < needed else None


def _header_problem(header: bytes, size: int) -> str | None:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "nothing" if not header else "zeros" if not any(header) else "no tar header"
    _, dot, extension = member.name.rpartition("/")[2].rpartition(".")
    is_image = extension.lower() in IMAGE_EXTENSIONS or not dot or len(member.name) >= MAX_USTAR_NAME
    if not member.isreg() or not is_image:
        return f"{member.name}, no image,"
    return f"{member.name} of {member.size:,} bytes instead of {size:,}" if member.size != size else None
