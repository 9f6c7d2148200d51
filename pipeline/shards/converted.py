"""Data sets brought to a local disk once: pictures are converted, and shards in a store are copied."""

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from pipeline.defaults import STORE_RETRY_S
from pipeline.lock import locked
from pipeline.shards.copied import copied, is_remote
from pipeline.shards.index import split_folder
from pipeline.shards.manifest import MANIFEST_NAME
from pipeline.text import notify_after

CACHE = Path("shards/converted")
VAL_RATIO = 0.1  # of every class, where nothing else is asked for

log = logging.getLogger(__name__)


def as_shards(
    dataset_name: str,
    data_path: Path | str,
    cache: Path | str | None = None,
    val_ratio: float | None = None,
    resize: int | None = None,
    retry_s: float = STORE_RETRY_S,
) -> Path:
    """Return `data_path`, or a folder of shards `copied` or `converted` from there. Raises FileNotFoundError, ValueError."""
    source, cache = Path(data_path), Path(cache or CACHE)
    try:
        if is_remote(data_path):
            source = copied(str(data_path), cache, retry_s)
        else:
            split_folder(dataset_name, data_path, "train")
    except FileNotFoundError:
        if is_remote(data_path) or not (source.is_file() or (source.is_dir() and any(source.iterdir()))):
            raise
        return converted(source, cache, val_ratio=VAL_RATIO if val_ratio is None else val_ratio, resize=resize or 0)
    for name, value in (("val_ratio", val_ratio), ("resize", resize)):
        if value is not None:
            raise ValueError(f"data.{name}: {value} is for pictures, but {data_path} holds shards already. Remove it")
    return source


def converted(source: Path, cache: Path = CACHE, *, val_ratio: float = 0.0, resize: int = 0) -> Path:
    """Return a folder with the shards of whatever `tools/make_shards.py convert` reads, which makes them on first use.

    `val_ratio`: the share of every class that becomes `val/`; `resize`: pixels of the shorter side, 0 for no change. The folder
    in `cache` is named by a digest of the files' names, sizes and times, so changed images are converted anew. Processes that ask
    for the same one wait for the first. Raises FileNotFoundError if there is no source, ValueError if it cannot be converted.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    flags = (("--val-ratio", val_ratio), ("--resize", resize))
    options = [part for flag, value in flags if value for part in (flag, str(value))]
    with notify_after(2, f"listing the files of {source} ..."):
        digest = hashlib.sha256("\0".join([*options, *_files(source)]).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    folder = cache / f"{source.resolve().name}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    splits = ("train", "val") if val_ratio else ("train",)
    with ExitStack() as held:
        with notify_after(2, f"waiting for {folder}, which another process makes ..."):
            held.enter_context(locked(cache / f".{folder.name}.lock"))
        if all((folder / split / MANIFEST_NAME).exists() for split in splits):
            log.info(f"{source}: using its shards in {folder}")
            return folder
        start = time.monotonic()
        command = [sys.executable, "-m", "tools.make_shards", "convert", str(source), "--out", str(folder), *options]
        if subprocess.run(command, stdout=2).returncode:
            raise ValueError(f"{source}: cannot be converted, as said above. The same by hand: {' '.join(command[1:])}")
        size = sum(path.stat().st_size for path in folder.glob("*/*.tar"))
        log.info(f"{source}: converted to {folder}, {size / 1e6:,.0f} MB, in {time.monotonic() - start:.0f} s")
        return folder


def _files(source: Path) -> Iterator[str]:
    """Yield name, size and time of modification of each file, in a fixed order."""
    for folder, folders, names in os.walk(source, followlinks=True) if source.is_dir() else [("", [], [str(source)])]:
        folders.sort()
        place = os.path.relpath(folder, source) if folder else ""
        for name in sorted(names):
            with suppress(OSError):  # a link that leads nowhere
                status = os.stat(os.path.join(folder, name))
                yield f"{place}/{name} {status.st_size, status.st_mtime_ns}"
