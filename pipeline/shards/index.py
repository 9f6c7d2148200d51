"""The shard index: where every sample lies, how large it is and what it is labelled."""

import hashlib
import os
import tarfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from pipeline.shards.cache import CacheSettings, ShardCache
from pipeline.shards.check import check_shards
from pipeline.shards.fetcher import ShardFetcher
from pipeline.shards.index_file import INDEX_NAME, SAMPLE_DTYPE, UNLABELLED, load_index, save_index
from pipeline.shards.object_store import is_remote
from pipeline.shards.remote import RemoteShards, open_remote, remote_split
from pipeline.shards.scan import IMAGE_EXTENSIONS, scan_shard
from pipeline.shards.storage import join, read_range

__all__ = [
    "IMAGE_EXTENSIONS",
    "INDEX_NAME",
    "SAMPLE_DTYPE",
    "UNLABELLED",
    "ShardIndex",
    "open_index",
    "save_index",
    "scan_shard",
    "split_folder",
]


EXACT_ROWS, SPREAD_ROWS = 1 << 21, 1 << 14  # of a digest: a larger index is mapped, and reading it all takes minutes


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one split, in stored order.

    `folder`: where the tars lie, the URL of a prefix as text. `shards`: tar names relative to it. `samples`: `[N]` of
    SAMPLE_DTYPE, ordered by shard; a large index is mapped from its file. `counts`: `[num_shards] int64`, the samples of each
    shard. `remote`: of a prefix, how its shards come to this machine.
    """

    folder: Path | str
    shards: tuple[str, ...]
    samples: np.ndarray
    counts: np.ndarray
    remote: RemoteShards | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that tell this data set from others, wherever its folder lies.

        Of the tars' names and sizes in samples, and of every sample's place, size and label. Of more than two million samples
        only 16,384, evenly spread, are looked at.
        """
        digest = hashlib.sha256("\0".join(self.shards).encode("utf-8", "surrogatepass"))
        digest.update(self.counts.astype("<i8").tobytes())
        step = 1 if len(self) <= EXACT_ROWS else len(self) // SPREAD_ROWS
        digest.update(np.ascontiguousarray(self.samples[::step]).tobytes())
        return digest.hexdigest()[:16]

    def shard_place(self, shard: int) -> str:
        """The path or URL of one tar."""
        return join(self.folder, self.shards[shard])

    def shard_path(self, shard: int) -> Path:
        """The tar as a local file, which of a prefix exists while it is in the cache."""
        return Path(self.shard_place(shard)) if self.remote is None else self.remote.path(int(shard))

    def cached(self, settings: CacheSettings) -> "ShardIndex":
        """The same, with another cache for the shards of a store."""
        if self.remote is None:
            return self
        return replace(self, remote=replace(self.remote, cache=ShardCache(settings)))

    def fetcher(self) -> ShardFetcher | None:
        """What brings the shards of a prefix into the cache; None for local ones."""
        return None if self.remote is None else self.remote.fetcher()

    def sizes(self) -> np.ndarray:
        """`[num_shards] int64`: the number of samples in each shard."""
        return self.counts

    def key(self, row: int) -> str:
        """The member name of one sample, read from its tar header; words in brackets where none can be read."""
        sample, block = self.samples[row], tarfile.BLOCKSIZE
        try:
            header = self._read(sample["shard"], int(sample["offset"]) - block, block)
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            return "(no readable tar header)"

    def encoded(self, row: int) -> bytes:
        """The image file of one sample. Raises OSError."""
        sample = self.samples[row]
        return self._read(sample["shard"], int(sample["offset"]), int(sample["size"]))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if self.remote is not None:
            try:
                return read_range(os.fspath(self.shard_path(shard)), offset, size)
            except FileNotFoundError:
                pass  # not in the cache
        return read_range(self.shard_place(shard), offset, size)

    def describe(self, row: int) -> str:
        """One sample for error messages: shard, member name and offset."""
        sample = self.samples[row]
        return f"{self.shard_place(sample['shard'])}: {self.key(row)} at byte {sample['offset']}"


@overload
def split_folder(dataset_name: str, data_path: Path, split: str) -> Path: ...
@overload
def split_folder(dataset_name: str, data_path: Path | str, split: str) -> Path | str: ...
def split_folder(dataset_name: str, data_path: Path | str, split: str) -> Path | str:
    """The folder with the shards of `split`: `data_path/split`, or `data_path` itself when it holds tars.

    The same holds for a prefix in a store, where the index decides. Raises FileNotFoundError that names the command which makes
    the shards of `dataset_name`, or the settings of the store.
    """
    if is_remote(data_path):
        return remote_split(str(data_path), split)
    data_path = Path(data_path)
    for folder in (data_path / split, data_path):
        if tar_names(folder):
            return folder
    command = f"python tools/make_shards.py convert SOURCE --out {data_path} --split {split}"
    if dataset_name == "sample":
        command = f"python tools/make_shards.py sample --out {data_path}"
    raise FileNotFoundError(f"{data_path / split}: no {dataset_name} shards (*.tar) here. Make them with `{command}`")


def tar_names(folder: Path) -> list[str]:
    """The tars of a folder, hidden ones left out; none when there is no such folder. Raises ValueError when it is unreadable."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name.endswith(".tar") and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}). Check its permissions") from None


def open_index(folder: Path | str) -> ShardIndex:
    """Read `folder/index.npz`; a local folder of tars without one is scanned, header by header. Then look into every tar; into
    those of a store when they come.

    Raises FileNotFoundError when there are no shards, ValueError for an index that is damaged or does not fit its tars, and
    for a tar that is missing, unreadable, truncated, zero-filled or foreign.
    """
    place, rebuild = join(folder, INDEX_NAME), f"Rebuild it: `python tools/make_shards.py index {folder}`"
    if isinstance(folder, str) and is_remote(folder):
        folder = folder.rstrip("/")
        return ShardIndex(folder, *open_remote(folder))
    folder = Path(folder)
    names = tar_names(folder)
    if not names:
        raise FileNotFoundError(
            f"{folder}: no shards (*.tar) here. Make them with `python tools/make_shards.py convert SOURCE --out {folder}`"
        )
    if not (folder / INDEX_NAME).exists():
        return _scanned(folder, names)
    index = ShardIndex(folder, *load_index(folder / INDEX_NAME, place, rebuild))
    unknown = sorted(set(names) - set(index.shards))
    if unknown:
        # Ignoring them would silently train on a part of the data.
        raise ValueError(
            f"{place}: lists {len(index.shards)} tars, and {folder} holds {len(unknown)} more ({unknown[0]}, ...). "
            f"Move them away, or include them. {rebuild}"
        )
    check_shards([index.shard_place(k) for k in range(len(index.shards))], index.samples, index.counts, place, rebuild)
    return index


def _scanned(folder: Path, names: list[str]) -> ShardIndex:
    scans = [scan_shard(folder / name, shard) for shard, name in enumerate(names)]
    return ShardIndex(folder, tuple(names), np.concatenate(scans), np.array([len(scan) for scan in scans], np.int64))
