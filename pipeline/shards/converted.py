"""Images that are not in shards yet, converted once into a cache."""

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.lock import locked
from pipeline.shards.manifest import MANIFEST_NAME
from pipeline.text import notify_after, printable

CACHE = Path("shards/converted")

log = logging.getLogger(__name__)


def converted(source: Path, cache: Path = CACHE, *, val_ratio: float = 0.0, resize: int = 0) -> Path:
    """Return a folder with the shards of whatever `tools/make_shards.py convert` reads, which makes them on first use.

    `val_ratio`: the share of every class that becomes `val/`; `resize`: pixels of the shorter side, 0 for no change. The folder
    in `cache` is named by a digest of the files' names, sizes and times, so changed images are converted anew. Processes that ask
    for the same one wait for the first. Raises FileNotFoundError if there is no source, ValueError if it cannot be converted.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    options = ["--val-ratio", str(val_ratio), "--resize", str(resize)]
    options = [part for pair in zip(options[::2], options[1::2], strict=True) if float(pair[1]) for part in pair]
    with notify_after(2, f"listing the files of {source} ..."):
        digest = hashlib.sha256("\0".join([*options, *_files(source)]).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    folder = cache / f"{source.resolve().name}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    splits = ("train", "val") if val_ratio else ("train",)
    with notify_after(2, f"waiting for {folder}, which another process makes ..."), locked(cache / f".{folder.name}.lock"):
        if all((folder / split / MANIFEST_NAME).exists() for split in splits):
            log.info(f"{source}: using its shards in {folder}")
            return folder
        start = time.monotonic()
        command = [sys.executable, "-m", "tools.make_shards", "convert", str(source), "--out", str(folder), *options]
        if subprocess.run(command, stdout=2).returncode:
            raise ValueError(f"{source}: cannot be converted, as said above. The same by hand: {' '.join(command[1:])}")
        size = sum(path.stat().st_size for path in folder.glob("*/*.tar"))
        log.info(f"{printable(str(source))}: converted to {folder}, {size / 1e6:,.0f} MB, in {time.monotonic() - start:.0f} s")
        return folder


def _files(source: Path) -> Iterator[str]:
    """Yield name, size and time of modification of each file, in a fixed order."""
    for folder, folders, names in os.walk(source, followlinks=True) if source.is_dir() else [("", [], [str(source)])]:
        folders.sort()
        for name in sorted(names):
            status = os.stat(os.path.join(folder, name)) if os.path.exists(os.path.join(folder, name)) else None
            yield f"{os.path.relpath(folder, source) if folder else ''}/{name} {status and (status.st_size, status.st_mtime_ns)}"
