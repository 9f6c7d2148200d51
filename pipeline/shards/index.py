"""The shard index: where every sample lies, how large it is and what it is labelled."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.defaults import STORE_RETRY_S
from pipeline.shards import index_file
from pipeline.shards.advice import advise
from pipeline.shards.cache import CacheSettings, Pins, ShardCache, StoredShard
from pipeline.shards.fetcher import FolderWatch, ShardFetcher
from pipeline.shards.index_file import INDEX_NAME, SAMPLE_DTYPE, UNLABELLED, load_index, save_index
from pipeline.shards.manifest import check_fits, read_manifest
from pipeline.shards.samples import MAX_LABEL_BYTES, scan_shard
from pipeline.shards.storage import MissingObject, StoreError, check_prefix, is_remote, join, read_bytes, sizes
from pipeline.shards.tar import sample_key

__all__ = [
    "INDEX_NAME", "SAMPLE_DTYPE", "UNLABELLED", "ShardIndex", "open_index", "save_index", "scan_shard", "split_folder",
]  # fmt: skip

IMAGE = "img"  # the component's name in DALI's index files
MAX_MEMBERS = 8  # of a sample after its image, among which its name is looked for
# A larger index is mapped, and reading all of it takes minutes: its digest covers evenly spaced rows.
MAX_DIGEST_ROWS, NUM_SPACED_ROWS = 1 << 21, 1 << 14


@dataclass(frozen=True)
class RemoteShards:
    """The shards of a prefix by number, None for one without samples, and the cache that they go through."""

    stored: tuple[StoredShard | None, ...]
    cache: ShardCache


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one split, in stored order.

    `folder`: a path, or the URL of a prefix as text. `shards`: tar names relative to it. `samples`: `[N]` of SAMPLE_DTYPE,
    ordered by shard; a large index is mapped from its file. `counts`: `[num_shards] int64`, the samples of each shard.
    `remote`: None for a folder, whose tars are waited for up to `retry_s` when they cannot be read.
    """

    folder: Path | str
    shards: tuple[str, ...]
    samples: np.ndarray
    counts: np.ndarray
    remote: RemoteShards | None = field(default=None, compare=False)
    retry_s: float = field(default=STORE_RETRY_S, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that tell this data set from others, wherever its folder lies.

        It covers the names and sample counts of the tars, and offset, sizes and label of every sample; above two million
        samples, those of 16,384 evenly spaced ones.
        """
        digest = hashlib.sha256("\0".join(self.shards).encode("utf-8", "surrogatepass"))
        digest.update(self.counts.astype("<i8").tobytes())
        step = 1 if len(self) <= MAX_DIGEST_ROWS else len(self) // NUM_SPACED_ROWS
        digest.update(np.ascontiguousarray(self.samples[::step]).tobytes())
        return digest.hexdigest()[:16]

    def shard_place(self, shard: int) -> str:
        """The path or URL of one tar."""
        return join(self.folder, self.shards[shard])

    def shard_path(self, shard: int) -> Path:
        """The tar as a local file; one of a prefix exists only while it is in the cache."""
        if self.remote is None:
            return Path(self.shard_place(shard))
        stored = self.remote.stored[int(shard)]
        return self.remote.cache.folder / (stored.name if stored else "none")

    def cached(self, settings: CacheSettings) -> "ShardIndex":
        """The same index with another cache for the shards of a store, or another patience with those of a folder."""
        if self.remote is None:
            return replace(self, retry_s=settings.retry_s)
        return replace(self, remote=replace(self.remote, cache=ShardCache(settings)))

    def fetcher(self) -> ShardFetcher | FolderWatch:
        """Return what downloads the shards of a prefix or watches those of a folder.

        Raises ValueError for a cache that cannot be made, OSError for a shard that is gone.
        """
        if self.remote is None:
            return FolderWatch([self.shard_path(shard) for shard in range(len(self.shards))], self.retry_s)
        self.remote.cache.make()
        return ShardFetcher(self.remote.stored, self.remote.cache)  # type: ignore[arg-type]

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
            try:
                content = read_bytes(self.shard_path(shard), offset, size)
            except FileNotFoundError:  # not in the cache
                content = read_bytes(self.shard_place(shard), offset, size)
        except ValueError as error:
            raise StoreError(str(error)) from None
        if len(content) < size:
            raise StoreError(f"{self.shard_place(shard)}: ends after {offset + len(content):,} bytes, inside a sample")
        return content

    def describe(self, row: int) -> str:
        """One sample for error messages: shard, member name and offset."""
        sample = self.samples[row]
        return f"{self.shard_place(sample['shard'])}: {self.key(row)} at byte {sample['offset']}"


def split_folder(dataset_name: str, data_path: Path | str, split: str) -> Path | str:
    """The folder with the shards of `split`: `data_path/split`, or `data_path` itself if it holds tars.

    The same holds for a prefix in a store, where the index decides. Raises FileNotFoundError that says how to get shards,
    StoreError, and ValueError for a URL without a bucket.
    """
    if is_remote(data_path):
        return _remote_split(str(data_path), split)
    folders = Path(data_path) / split, Path(data_path)
    for folder in folders:
        if tar_names(folder):
            return folder
    if dataset_name == "sample":
        command = f"python tools/make_shards.py sample --out {data_path}"
        raise FileNotFoundError(f"{folders[0]}: no sample shards (*.tar) here. Make them with `{command}`")
    raise FileNotFoundError(advise(str(data_path), split))


def _remote_split(prefix: str, split: str) -> str:
    check_prefix(prefix)
    folders = (join(prefix, split), prefix.rstrip("/"))
    for folder in folders:
        try:
            read_bytes(join(folder, INDEX_NAME), 0, 4)
            return folder
        except MissingObject as error:
            reason = str(error).removeprefix(f"{join(folder, INDEX_NAME)}: ")
    raise FileNotFoundError(
        f"{', '.join(join(folder, INDEX_NAME) for folder in folders)}: {reason}. Shards in a store need an index: write it with "
        "`python tools/make_shards.py index FOLDER` before they are uploaded"
    )


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
    """Read the index of a folder or prefix, and compare it with the tars; those of a store are compared when they arrive.

    A folder of tars without an index is scanned, header by header. Raises FileNotFoundError if there are no shards, ValueError
    for an index that is damaged or does not fit its tars, and for a tar that is missing, unreadable, truncated, zero-filled or
    foreign; StoreError.
    """
    if isinstance(folder, str) and is_remote(folder):
        return _open_remote(folder.rstrip("/"))
    folder = Path(folder)
    names, rebuild = tar_names(folder), f"Rebuild it: `python tools/make_shards.py index {folder}`"
    if not names:
        raise FileNotFoundError(
            f"{folder}: no shards (*.tar) here. Make them with `python tools/make_shards.py convert SOURCE --out {folder}`"
        )
    manifest = read_manifest(folder)
    try:
        shards, samples, counts, ends = load_index(folder, rebuild)
    except FileNotFoundError:
        scans = [scan_shard(folder / name, shard) for shard, name in enumerate(names)]
        samples, counts = np.concatenate(scans), np.array([len(scan) for scan in scans], np.int64)
        check_fits(folder, manifest, tar_sizes(folder, names), len(samples))
        return ShardIndex(folder, tuple(names), samples, counts)
    num_bytes = tar_sizes(folder, names)
    if unlisted := sorted(set(names) - set(shards)):
        check_fits(folder, manifest, num_bytes, len(samples))  # tars of another conversion are not to be included
        # Ignoring them would silently train on a part of the data.
        raise ValueError(
            f"{folder}: the index lists {len(shards)} tars, and the folder holds {len(unlisted)} more "
            f"({unlisted[0]}, ...). Move them away, or include them. {rebuild}"
        )
    index_file.check_shards([folder / name for name in shards], ends)
    check_fits(folder, manifest, num_bytes, len(samples))
    return ShardIndex(folder, shards, samples, counts)


def _open_remote(folder: str) -> ShardIndex:
    """Open a prefix with one request each for the files of the index, the manifest and the listing."""
    remedy = "Upload it again"
    names, samples, counts, ends = load_index(folder, remedy)
    manifest, listed = read_manifest(folder), sizes(folder)
    check_fits(folder, manifest, dict.fromkeys(names, 0), len(samples))
    entries = {shard.name: shard for shard in manifest.shards if shard.bytes is not None} if manifest else {}
    stored, stops = list[StoredShard | None]([None] * len(names)), np.cumsum(counts)
    for shard, pair in ends.items():
        name, url, entry = names[shard], join(folder, names[shard]), entries.get(names[shard])
        num_bytes = entry.bytes if entry and entry.bytes else int((pair["offset"] + pair["size"]).max())
        if listed is not None and "/" not in name:
            size, source = listed.get(name), "manifest" if entry else "index"
            if size is None:
                raise ValueError(f"{url}: listed in the index but missing. {remedy}, or rebuild the index")
            if size < num_bytes or (entry and size != num_bytes):
                problem = "truncated" if size < num_bytes else "changed"
                raise ValueError(f"{url}: {problem}: {size:,} bytes, and the {source} needs {num_bytes:,}. {remedy}")
        sha256 = entry.sha256 if entry else ""
        rows = samples[stops[shard] - counts[shard] : stops[shard]]
        tag = sha256 or hashlib.sha256(rows.tobytes()).hexdigest()
        stored[shard] = StoredShard(url, f"{Path(name).stem}-{tag[:24]}.tar", num_bytes, sha256, pair.copy())
    return ShardIndex(folder, names, samples, counts, RemoteShards(tuple(stored), ShardCache(CacheSettings())))


def write_dali_indices(
    index: ShardIndex, rows: np.ndarray, folder: Path, pins: Pins | None = None
) -> tuple[list[str], list[str]]:
    """Write rows of the index, in their order, as DALI index files in `folder`.

    Returns the tars and their index files; a tar is listed once for each run of its rows, since an index file can drop, permute
    and repeat the members of a tar. Tars of a store are read through their links in `pins`.
    """
    samples = index.samples[rows]
    breaks = np.flatnonzero(np.diff(samples["shard"])) + 1
    tars, paths = list[str](), list[str]()
    for part, run in zip(np.split(rows, breaks), np.split(samples, breaks), strict=True):
        members = zip(part.tolist(), run["offset"].tolist(), run["size"].tolist(), strict=True)
        lines = [f"{IMAGE} {offset} {size} {row}.{IMAGE}\n" for row, offset, size in members]
        path, tar = folder / f"{len(tars):06d}.idx", index.shard_path(run["shard"][0])
        path.write_text(f"v1.2 {len(lines)}\n{''.join(lines)}")
        tars.append(os.fspath(tar if pins is None else pins.folder / tar.name))
        paths.append(os.fspath(path))
    return tars, paths
