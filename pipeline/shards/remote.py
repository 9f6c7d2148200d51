"""The shards of a split in a store: its index, what the manifest says of each tar, and how they come to this machine."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.shards.cache import CacheSettings, ShardCache, StoredShard
from pipeline.shards.check import first_and_last
from pipeline.shards.fetcher import ShardFetcher
from pipeline.shards.index_file import INDEX_NAME, load_index
from pipeline.shards.manifest import read_manifest
from pipeline.shards.object_store import MissingObject, check_prefix, read, read_range, sizes
from pipeline.shards.storage import join


@dataclass(frozen=True)
class RemoteShards:
    """`stored`: by number; None for a shard without samples, which nobody needs."""

    stored: tuple[StoredShard | None, ...]
    cache: ShardCache

    def path(self, shard: int) -> Path:
        """Where the shard lies while it is in the cache."""
        stored = self.stored[shard]
        return self.cache.path(stored) if stored else self.cache.folder / "none"

    def fetcher(self) -> ShardFetcher:
        self.cache.make()
        return ShardFetcher(self.stored, self.cache)  # type: ignore[arg-type]


def remote_split(prefix: str, split: str) -> str:
    """`prefix/split`, or the prefix itself when that holds the index.

    Raises FileNotFoundError, StoreError, and ValueError for a URL without a bucket.
    """
    check_prefix(prefix)
    tried = [join(folder, INDEX_NAME) for folder in (join(prefix, split), prefix)]
    for url in tried:
        try:
            read_range(url, 0, 4)
            return url.removesuffix(f"/{INDEX_NAME}")
        except MissingObject as error:
            reason = str(error).removeprefix(f"{url}: ")
    raise FileNotFoundError(
        f"{tried[0]}, {tried[1]}: {reason}. Shards in a store need their {INDEX_NAME}: write it with "
        "`python tools/make_shards.py index FOLDER` before they are uploaded, or convert with `--out` to the store"
    )


def open_remote(folder: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, RemoteShards]:
    """Names, samples and counts of the index, and the shards. One request each for index, manifest and listing.

    Raises FileNotFoundError or StoreError, and ValueError for an index that is damaged or does not fit what is listed.
    """
    place, again = join(folder, INDEX_NAME), "Upload it again"
    names, samples, counts = load_index(read(place), place, again)
    pairs, manifest, listed = first_and_last(samples, counts, place, again), read_manifest(folder), sizes(folder)
    stored: list[StoredShard | None] = [None] * len(names)
    firsts = np.cumsum(counts) - counts
    for shard, pair in pairs.items():
        name, url = names[shard], join(folder, names[shard])
        num_bytes, sha256 = int((pair["offset"] + pair["size"]).max()), ""
        if manifest is not None and name in manifest.sizes:
            num_bytes, sha256 = manifest.sizes[name], manifest.checksums[name]
        if listed is not None:
            _check_listed(url, num_bytes, sha256, listed.get(name.rpartition("/")[2]) if "/" not in name else num_bytes)
        rows = samples[firsts[shard] : firsts[shard] + counts[shard]]
        tag = sha256 or hashlib.sha256(rows.tobytes()).hexdigest()
        stored[shard] = StoredShard(url, f"{Path(name).stem}-{tag[:24]}.tar", num_bytes, sha256, pair.copy())
    return names, samples, counts, RemoteShards(tuple(stored), ShardCache(CacheSettings()))


def _check_listed(url: str, num_bytes: int, sha256: str, found: int | None) -> None:
    if found is None:
        raise ValueError(f"{url}: listed in the index but missing. Upload it again, or write the index anew")
    if found < num_bytes or (sha256 and found != num_bytes):
        raise ValueError(
            f"{url}: {found:,} bytes, and the {'manifest' if sha256 else 'index'} needs {num_bytes:,}: "
            f"{'truncated' if found < num_bytes else 'changed'}. Upload it again"
        )
