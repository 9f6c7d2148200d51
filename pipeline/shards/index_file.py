"""`index.npz`: written whole, and opened in a time that does not grow with it."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

INDEX_NAME = "index.npz"
MANIFEST_NAME = "manifest.json"  # beside it
UNLABELLED = -1

# One row per sample. `offset` and `size` (bytes) span the encoded image inside the tar; height and width are pixels.
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("label", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
    ]
)

# Samples that take more than this (two million) are mapped, so that only the rows in use are in memory. Below it, the whole
# file is read and its checksums are compared.
MAPPED_BYTES = 1 << 26
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
DAMAGES = (
    EOFError, KeyError, MemoryError, NotImplementedError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def save_index(folder: Path, shards: list[str], samples: np.ndarray) -> None:
    """Write `folder/index.npz` beside and rename it. The same input gives the same bytes.

    `samples`: `[N]` of SAMPLE_DTYPE, ordered by shard and, inside a shard, by offset.
    """
    temporary = folder / f".{INDEX_NAME}.partial"
    counts = np.bincount(samples["shard"], minlength=len(shards))
    with temporary.open("wb") as file:
        np.savez(
            file,
            shards=np.array(shards, dtype=np.str_),
            samples=samples.astype(SAMPLE_DTYPE, copy=False),
            counts=counts.astype("<i8"),
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / INDEX_NAME)


def load_index(source: Path | bytes, place: str, rebuild: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """The shards' names, their samples `[N]` and the number of each shard's samples, `[num_shards] int64`.

    `source`: the file, or its content. `place` and `rebuild`, the command that makes it again, are for the ValueError that a
    file raises which is damaged or no index.
    """
    try:
        with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            shards, samples, counts = _read(file, source)
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror or error}). Check its permissions") from None
    except DAMAGES as error:
        # Some of these carry no text, a zip's bad checksum carries a long one.
        raise ValueError(f"{place}: damaged, or not an index ({error or type(error).__name__}). {rebuild}") from None
    if len(samples) == 0:
        raise ValueError(f"{place}: lists no samples. {rebuild}")
    return shards, samples, counts


def _read(file: BinaryIO, source: Path | bytes) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        shards, member = _array(archive, "shards"), archive.getinfo("samples.npy")
        if isinstance(source, Path) and member.compress_type == zipfile.ZIP_STORED and member.file_size > MAPPED_BYTES:
            samples = _mapped(archive, member, file, source)
        else:
            samples = _array(archive, "samples")
        # Indices of the first version have no counts.
        counts = _array(archive, "counts") if "counts.npy" in archive.namelist() else None
    if shards.dtype.kind != "U" or shards.ndim != 1 or samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        raise ValueError(
            f"shards is {shards.dtype} {shards.shape}, samples is {samples.dtype} {samples.shape}; "
            f"expected are names and one row per sample of {SAMPLE_DTYPE.names}"
        )
    if counts is None:
        counts = np.bincount(samples["shard"], minlength=len(shards))
    if counts.shape != shards.shape or counts.dtype != np.int64 or counts.min(initial=0) < 0:
        raise ValueError(f"{len(shards)} shards, but counts of {len(counts)}")
    if counts.sum() != len(samples):
        raise ValueError(f"{len(samples)} samples, but counts of {counts.sum()}")
    return tuple(shards.tolist()), samples, counts


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; reading it to its end compares its checksum."""
    with archive.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{name} has bytes left over")
    return array


def _mapped(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO, path: Path) -> np.ndarray:
    with archive.open(member) as content:
        version = np.lib.format.read_magic(content)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(content)
        header_bytes = content.tell()
    file.seek(member.header_offset)
    name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(LOCAL_HEADER))
    start = member.header_offset + LOCAL_HEADER + name_bytes + extra_bytes + header_bytes
    return np.asarray(np.memmap(path, dtype, "r", start, shape))
