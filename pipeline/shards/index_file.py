"""The files of an index: `index.npy`, a row per sample, and `index.json`, the shards; and their comparison with the tars."""

import hashlib
import io
import json
import os
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, InstanceOf

from pipeline.files import read_bytes, write_atomic
from pipeline.shards.manifest import as_model, read_object
from pipeline.shards.tar import IMAGE_EXTENSIONS, head_kind

INDEX_NAME = "index.json"
SAMPLES_NAME = "index.npy"
INDEX_FILES = (SAMPLES_NAME, INDEX_NAME)  # in the order in which they are written and copied
UNLABELLED = -1

# One row per sample. `offset` and `size` (bytes) span the encoded image inside the tar; height and width are pixels.
SAMPLE_DTYPE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")]
)
CHECKSUM_BYTES = 32  # of sha256
# Everything that Pillow, numpy, zipfile and pyarrow raise for damaged content, whatever they document.
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
BLOCK = tarfile.BLOCKSIZE
MAX_USTAR_NAME = 90  # characters: writers cut longer names off in the header, at 100 bytes or before
CHECK_THREADS = 16  # a network file system answers many requests at once; on a local disk threads cost nothing


class IndexContent(BaseModel):
    """The content of `index.json`. `shards`: the number of samples by name, in order. `checksum`: of both files."""

    checksum: InstanceOf[str]
    shards: dict[InstanceOf[str], Annotated[int, Field(ge=0, lt=1 << 40, strict=True)]]


def save_index(folder: Path, shards: list[str], samples: np.ndarray) -> None:
    """Write the index of a folder. `samples`: `[N]` of SAMPLE_DTYPE, ordered by shard and, inside it, by offset."""
    counts = np.bincount(samples["shard"], minlength=len(shards)).tolist()
    files = index_files(dict(zip(shards, counts, strict=True)), samples.astype(SAMPLE_DTYPE, copy=False))
    for name, content in files.items():
        write_atomic(folder / name, content)


def index_files(shards: dict[str, int], samples: np.ndarray) -> dict[str, bytes]:
    """Return the content of INDEX_FILES by name. `shards`: the number of samples by name."""
    file = io.BytesIO()
    np.save(file, samples)
    checksum = _checksum(shards, file.getbuffer())
    # The checksum is in both: a crash or another writer between the two renames never leaves a pair that looks right.
    file.write(checksum)
    text = json.dumps({"checksum": checksum.hex(), "shards": shards}, indent=1) + "\n"
    return {SAMPLES_NAME: file.getvalue(), INDEX_NAME: text.encode()}


def _checksum(shards: dict[str, int], array_file: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(json.dumps(shards).encode())
    digest.update(array_file)
    return digest.digest()


def load_index(folder: Path, remedy: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Return the names of the shards, the samples `[N]`, the number of samples per shard, `[num_shards] int64`, and the ends.

    The ends are the first and the last sample, `[2]` of SAMPLE_DTYPE, of each shard that has samples. Raises FileNotFoundError
    without an index, ValueError that ends with `remedy` for a damaged one.
    """
    place = folder / INDEX_NAME
    content = as_model(IndexContent, read_object(place, remedy), place, remedy)
    names, counts = tuple(content.shards), np.array([*content.shards.values()], np.int64)
    place = folder / SAMPLES_NAME
    samples = _load_samples(place, content, remedy)
    used, ends, problem = np.flatnonzero(counts), samples, ""
    if samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        problem = f"samples is {samples.dtype} {samples.shape}; expected is one row per sample of {SAMPLE_DTYPE.names}"
    elif counts.sum() != len(samples):
        problem = f"{len(samples)} samples, but counts of {counts.sum()}"
    elif len(samples) == 0:
        problem = "lists no samples"
    else:
        stops = np.cumsum(counts)[used]
        ends = samples[np.stack([stops - counts[used], stops - 1], axis=1)]  # [shards, 2]
        shards, offsets, sizes, labels, heights, widths = (samples[name] for name in SAMPLE_DTYPE.names or ())
        is_sane = (shards == np.repeat(used, counts[used])) & (offsets >= BLOCK) & (offsets % BLOCK == 0)
        is_sane &= (sizes >= 0) & (labels >= UNLABELLED) & (heights > 0) & (widths > 0)
        # In this order, since hostile numbers could overflow.
        reach = np.repeat(ends["offset"][:, 1] + ends["size"][:, 1], counts[used])
        if not (is_sane & (sizes <= reach - offsets)).all():
            problem = "damaged, or not ordered by shard"
    if problem:
        raise ValueError(f"{place}: {problem}. {remedy}")
    return names, samples, counts, dict(zip(used.tolist(), ends, strict=True))


def _load_samples(path: Path, content: IndexContent, remedy: str) -> np.ndarray:
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, and {INDEX_NAME} is there. {remedy}") from None
    with suppress(*FAULTS):  # of a forged header
        if _checksum(content.shards, memoryview(data)[:-CHECKSUM_BYTES]).hex() == content.checksum:
            return np.asarray(np.load(io.BytesIO(data)))
    raise ValueError(f"{path}: damaged, or not of the {INDEX_NAME} next to it. {remedy}")


def check_shards(paths: Sequence[Path], ends: dict[int, np.ndarray]) -> None:
    """Raise ValueError for the first tar that differs from the index, with the number of others. `ends`: as from `load_index`."""

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
    with path.open("rb", buffering=0) as file:
        if (kind := head_kind(file.read(BLOCK))) != "a tar":
            return kind
        num_bytes, needed = os.fstat(file.fileno()).st_size, int((ends["offset"] + ends["size"]).max())
        if num_bytes < needed:
            return f"truncated: {num_bytes:,} bytes, and the index needs {needed:,}"
        for offset, size in zip(ends["offset"].tolist(), ends["size"].tolist(), strict=True):
            header, problem = os.pread(file.fileno(), BLOCK, offset - BLOCK), ""
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                _, dot, extension = member.name.rpartition("/")[2].rpartition(".")
                is_image = extension.lower() in IMAGE_EXTENSIONS or not dot or len(member.name) >= MAX_USTAR_NAME
                if not member.isreg() or not is_image:
                    problem = f"{member.name}, no image,"
                elif member.size != size:
                    problem = f"{member.name} of {member.size:,} bytes instead of {size:,}"
            except tarfile.TarError:
                problem = "no tar header"
            if problem:
                reason = "of another data set, or damaged" if any(header) else "zero-filled in part"
                return f"{reason}: {problem} at byte {offset - BLOCK:,}, where the index has a sample"
    return None
