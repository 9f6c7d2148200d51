"""The shard index: where every sample lies, how large it is and what it is labelled."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.files import read_bytes
from pipeline.shards.index_file import INDEX_NAME, SAMPLE_DTYPE, UNLABELLED, check_shards, load_index, save_index
from pipeline.shards.manifest import check_fits, read_manifest
from pipeline.shards.samples import MAX_LABEL_BYTES, scan_shard
from pipeline.shards.tar import sample_key
from pipeline.shards.watch import StoreError

__all__ = ["INDEX_NAME", "SAMPLE_DTYPE", "UNLABELLED", "ShardIndex", "open_index", "save_index", "scan_shard", "split_folder"]

PATTERN = re.compile(r"[*?\[]|\{.*\}")  # of several paths
IMAGE = "img"  # the component's name in DALI's index files
MAX_MEMBERS = 8  # of a sample after its image, among which its name is looked for


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one split, in stored order."""

    folder: Path
    shards: tuple[str, ...]  # the names of the tars in it
    samples: np.ndarray  # `[N]` of SAMPLE_DTYPE, ordered by shard
    counts: np.ndarray  # `[num_shards] int64`, the samples of each shard

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the names and sample counts of the tars and of all samples, wherever the folder lies."""
        digest = hashlib.sha256("\0".join(self.shards).encode("utf-8", "surrogatepass"))
        digest.update(self.counts.astype("<i8").tobytes())
        digest.update(self.samples.tobytes())
        return digest.hexdigest()[:16]

    def shard_path(self, shard: int) -> Path:
        return self.folder / self.shards[shard]

    def key(self, row: int) -> str:
        """The member name of one sample, read from its tar header; words in brackets if none can be read."""
        sample, block = self.samples[row], tarfile.BLOCKSIZE
        try:
            header = self._read(sample["shard"], int(sample["offset"]) - block, block)
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, ValueError, tarfile.TarError):
            return "(no readable tar header)"

    def name(self, row: int) -> str:
        """The file that one sample was made from, as its `json` member says after the image; without one, its member name."""
        sample, member, block = self.samples[row], self.key(row), tarfile.BLOCKSIZE
        start = int(sample["offset"]) + int(sample["size"])
        try:
            for _ in range(MAX_MEMBERS):
                start = -(-start // block) * block
                header = tarfile.TarInfo.frombuf(self._read(sample["shard"], start, block), "utf-8", "surrogateescape")
                key, extension = sample_key(header.name)
                if key != sample_key(member)[0]:
                    break
                start += block
                if extension == "json" and header.size <= MAX_LABEL_BYTES:
                    return str(json.loads(self._read(sample["shard"], start, header.size))["name"])
                start += header.size
        except (OSError, ValueError, LookupError, TypeError, RecursionError, tarfile.TarError):
            pass  # another program's members
        return member

    def encoded(self, row: int) -> bytes:
        """The image file of one sample, in full. Raises OSError if the storage does not give it."""
        sample = self.samples[row]
        return self._read(sample["shard"], int(sample["offset"]), int(sample["size"]))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            content = read_bytes(self.shard_path(shard), offset, size)
        except ValueError as error:
            raise StoreError(str(error)) from None
        if len(content) < size:
            raise StoreError(f"{self.shard_path(shard)}: ends after {offset + len(content):,} bytes, inside a sample")
        return content

    def describe(self, row: int) -> str:
        """One sample for error messages: shard, member name and offset."""
        sample = self.samples[row]
        return f"{self.shard_path(sample['shard'])}: {self.key(row)} at byte {sample['offset']}"


def split_folder(dataset_name: str, data_path: Path | str, split: str) -> Path:
    """The folder of a split's shards: `data_path/split` or `data_path`. Raises FileNotFoundError that says how to get shards."""
    path, convert = Path(data_path), f"`python tools/make_shards.py convert SOURCE --out {data_path}"
    for folder in (path / split, path):
        if tar_names(folder):
            return folder
    remedy = f"Set data_path to a folder of pictures, or run {convert} --val-ratio 0.1`"
    if dataset_name == "sample":
        remedy = f"Make them with `python tools/make_shards.py sample --out {path}`"
    elif "://" in str(data_path) or str(data_path).startswith("pipe:") or (PATTERN.search(str(path)) and not path.exists()):
        raise FileNotFoundError(
            f"{data_path}: patterns, commands and this kind of URL are not read. Name the folder of the shards, a folder of "
            "pictures or a prefix such as s3://BUCKET/PREFIX (gs, az, hf, https)"
        )
    elif split != "train" and (path / "train").exists():
        aside = "where the images have no such split, convert them into another folder with `--val-ratio 0.1`"
        remedy = f"Make them with {convert} --split {split}`; {aside}"
    raise FileNotFoundError(f"{path / split}: no shards (*.tar) here. {remedy}")


def tar_names(folder: Path) -> list[str]:
    """The tars of a folder without hidden ones; none if there is no such folder. Raises ValueError if it is unreadable."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name.endswith(".tar") and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}). Check its permissions") from None


def tar_sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of each tar. Raises ValueError for two names of one file, whose images would count twice."""
    known, sizes = dict[tuple[int, int], str](), {}
    for name in names:
        status = os.stat(folder / name)
        if (other := known.setdefault((status.st_dev, status.st_ino), name)) != name:
            raise ValueError(f"{folder / name}: the same file as {other}: its images would count twice. Remove one of the two")
        sizes[name] = status.st_size
    return sizes


def open_index(folder: Path | str) -> ShardIndex:
    """Read the index of a folder, or scan its tars, and compare. Raises FileNotFoundError without tars, ValueError for damage."""
    folder = Path(folder)
    names, rebuild = tar_names(folder), f"Rebuild it: `python tools/make_shards.py index {folder}`"
    if not names:
        convert = f"python tools/make_shards.py convert SOURCE --out {folder}"
        raise FileNotFoundError(f"{folder}: no shards (*.tar) here. Make them with `{convert}`")
    manifest = read_manifest(folder)
    try:
        shards, samples, counts, ends = load_index(folder, rebuild)
    except FileNotFoundError:
        scans = [scan_shard(folder / name, shard) for shard, name in enumerate(names)]
        shards, samples, ends = tuple(names), np.concatenate(scans), {}
        counts = np.array([len(scan) for scan in scans], np.int64)
    num_bytes = tar_sizes(folder, names)
    if unlisted := sorted(set(names) - set(shards)):
        check_fits(folder, manifest, num_bytes, len(samples))  # tars of another conversion are not to be included
        # Ignoring them would silently train on a part of the data.
        raise ValueError(
            f"{folder}: the index lists {len(shards)} tars, and the folder holds {len(unlisted)} more "
            f"({unlisted[0]}, ...). Move them away, or include them. {rebuild}"
        )
    check_shards([folder / name for name in shards], ends)
    check_fits(folder, manifest, num_bytes, len(samples))
    return ShardIndex(folder, shards, samples, counts)


def write_dali_indices(index: ShardIndex, rows: np.ndarray, folder: Path) -> tuple[list[str], list[str]]:
    """Write rows of the index as DALI index files, one for each run of rows in one tar; returns the tars and those files."""
    tars, paths = list[str](), list[str]()
    for part in np.split(rows, np.flatnonzero(np.diff(index.samples["shard"][rows])) + 1):
        run = index.samples[part]
        members = zip(part.tolist(), run["offset"].tolist(), run["size"].tolist(), strict=True)
        lines = [f"{IMAGE} {offset} {size} {row}.{IMAGE}\n" for row, offset, size in members]
        path = folder / f"{len(tars):06d}.idx"
        path.write_text(f"v1.2 {len(lines)}\n{''.join(lines)}")
        tars.append(os.fspath(index.shard_path(run["shard"][0])))
        paths.append(os.fspath(path))
    return tars, paths
