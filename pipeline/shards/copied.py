"""Shards in an object store, copied once into a folder on a local disk, through fsspec.

Failed requests are retried with exponential backoff, by this module only: the clients' own retries are switched off.
"""

import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from pipeline.defaults import STORE_RETRY_S
from pipeline.files import file_checksum, write_atomic
from pipeline.lock import locked
from pipeline.shards.index_file import INDEX_NAME, SAMPLES_NAME, check_shards, load_index
from pipeline.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.shards.watch import StoreError
from pipeline.text import Every, notify_after, plural

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# The client of each scheme finds the store and its credentials in these.
STORES = {
    "s3": "AWS_ENDPOINT_URL (of another store than Amazon's), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
    "hf": "HF_TOKEN, for a data set that is not public",
    **dict.fromkeys(("https", "http"), "the proxy and the server's permissions"),
}
SPLITS = ("train", "val")
STREAMS = 8  # parallel downloads
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 30.0
STALLED_S = 30.0  # without a byte
PROGRESS_S = 10.0
PERMANENT_ERRORS = (NotADirectoryError, IsADirectoryError, PermissionError, ValueError)  # no pause will change them


def is_remote(place: Path | str) -> bool:
    return isinstance(place, str) and place.partition("://")[0] in STORES and "://" in place


def copied(prefix: str, cache: Path, retry_s: float = STORE_RETRY_S) -> Path:
    """Return a folder with the shards under a prefix, in train/ and val/ or without splits, which are copied on first use.

    The folder in `cache` is named by the indices: another upload is another folder. Processes that ask for the same one wait for
    the first, and a copy that was cut short goes on. Raises FileNotFoundError for a prefix without an index, StoreError when the
    store fails for `retry_s` seconds, ValueError for shards that do not match their index and for a full disk.
    """
    store = _Store(prefix, retry_s)
    indices = {split: content for split in SPLITS if (content := store.read(f"{split}/{INDEX_NAME}"))}
    if not indices and (content := store.read(INDEX_NAME)):
        indices = {"": content}
    if not indices:
        raise FileNotFoundError(
            f"{prefix}: no {INDEX_NAME} here, in {' or in '.join(SPLITS)}. Shards in a store need an index: write it with "
            f"`python tools/make_shards.py index FOLDER` before they are uploaded. Or {store.what_to_check}"
        )
    digest = hashlib.sha256(b"".join(indices.values())).hexdigest()[:12]
    folder = cache / f"{store.url.rpartition('/')[2]}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with notify_after(2, f"waiting for {folder}, which another process makes ..."):
            held.enter_context(locked(cache / f".{folder.name}.lock"))
        if not folder.exists():
            unfinished = cache / f".{folder.name}.partial"
            try:
                for split, content in indices.items():
                    _copy_split(store, split, content, unfinished / split)
            except ValueError:  # of damaged files, which the next start must not find
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            unfinished.rename(folder)
    return folder


def _copy_split(store: "_Store", split: str, index: bytes, folder: Path) -> None:
    """Copy what is not in `folder` yet, and compare the tars with the index or, if there is one, with the manifest."""
    place = f"{split}/" if split else ""
    remedy = f"Upload {store.url}/{place} again"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / INDEX_NAME, index)
    if content := store.read(place + MANIFEST_NAME):
        write_atomic(folder / MANIFEST_NAME, content)
    checksums = {shard.name: shard.sha256 for shard in (read_manifest(folder) or Manifest()).shards}
    store.download(place + SAMPLES_NAME, folder / SAMPLES_NAME)
    names, _, _, ends = load_index(folder, remedy)
    if odd := [name for name in names if os.path.basename(name) != name]:
        raise ValueError(f"{folder / INDEX_NAME}: {odd[0]!r} is not the name of a file. {remedy}")
    missing = {name: ends[n] for n, name in enumerate(names) if n in ends and not (folder / name).exists()}
    needed, free = sum(int((e["offset"] + e["size"]).max()) for e in missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{store.url}/{place}: {needed / 1e9:,.1f} GB of shards, and the disk of {folder} has {free / 1e9:,.1f} GB free. "
            "Choose another data.cache_dir, or mount the store and name the folder"
        )
    log.info(f"copying {plural(len(missing), 'shard')} of {store.url}/{place}, {needed / 1e6:,.0f} MB, to {folder} ...")
    progress, pool = Every(PROGRESS_S), ThreadPoolExecutor(STREAMS)
    try:
        work = pool.map(lambda name: store.download(place + name, folder / name, checksums.get(name)), missing)
        for number, _ in enumerate(work, 1):
            if progress.due():
                log.info(f"{number} of {plural(len(missing), 'shard')} copied")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    check_shards([folder / name for name in names], ends)


class _Store:
    """A prefix of an object store. Raises ValueError for a URL without a bucket, and without the store's client."""

    def __init__(self, url: str, retry_s: float) -> None:
        self.url, self._retry_s, (kind, _, path) = url.rstrip("/"), retry_s, url.partition("://")
        self.what_to_check = f"check the name, the network and {STORES[kind]}"
        if not path.strip("/").partition("/")[0]:
            raise ValueError(f"{url}: not a place in a store; write {kind}://BUCKET/PREFIX")
        options: dict[str, Any] = {}
        try:
            if kind == "s3":
                once = {"retries": {"total_max_attempts": 1}, "connect_timeout": STALLED_S, "read_timeout": STALLED_S}
                options = {"config_kwargs": once, "max_concurrency": 1}
            elif kind in ("http", "https"):
                import aiohttp

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
                options = {"client_kwargs": {"timeout": timeout}}
            import fsspec  # here, so that shards on a local disk need no client

            self._system = fsspec.filesystem(kind, **options, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            missing, extra = str(error).rstrip("."), "https" if kind == "http" else kind
            raise ValueError(f"{missing}. For {kind}:// run `pip install -e '.[{extra}]'`") from None
        if kind == "s3":
            self._system.retries = 1

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None if there is none. Raises StoreError."""
        with suppress(FileNotFoundError):
            return self._retry(name, lambda path: bytes(self._system.cat_file(path)))
        return None

    def download(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Copy an object into a file, which appears when it is complete. Raises StoreError, FileNotFoundError."""
        partial = path.with_name(f".{path.name}.partial")

        def request(remote_path: str) -> None:
            self._system.get_file(remote_path, str(partial))
            if sha256 and file_checksum(partial) != sha256:
                raise OSError(f"its sha256 is not that of {MANIFEST_NAME}: changed in the store, or damaged")
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)

        self._retry(name, request)

    def _retry(self, name: str, request: Callable[[str], Result]) -> Result:
        """Return `request(path)`, tried again while the store fails."""
        url, started, pause_s = f"{self.url}/{name}", time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return request(self._system._strip_protocol(url))
            except FileNotFoundError:
                raise FileNotFoundError(f"{url}: no such object. {self.what_to_check.capitalize()}") from None
            except Exception as error:  # noqa: BLE001  # every client has errors of its own
                is_permanent, left_s = isinstance(error, PERMANENT_ERRORS), self._retry_s - (time.monotonic() - started)
                text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
                problem = text.splitlines()[0].strip()[:200].rstrip(".")
                if is_permanent or left_s <= 0:
                    tried = "" if is_permanent else f", tried for {self._retry_s:g} s"
                    raise StoreError(f"{url}: {problem}{tried}; {self.what_to_check}") from None
                if pause_s > 1:
                    log.warning(f"{url}: {problem}; trying again in {pause_s:.0f} s")
                time.sleep(min(pause_s * random.uniform(0.75, 1.25), left_s))  # so that many machines do not come back at once
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
