"""Shards converted for a store: staged on a disk, then uploaded, index and manifest last."""

import hashlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.shards.index_file import INDEX_FILES
from pipeline.shards.manifest import MANIFEST_NAME
from pipeline.shards.object_store import MissingObject, check_prefix, read, scheme, sizes, upload
from pipeline.shards.storage import join
from tools.shards.writer import RECORD_FOLDER

STREAMS = 4
RETRY_S = 120.0
UPLOADED_NAME = "uploaded.txt"


def staging_folder(url: str, given: Path | None, num_tasks: int) -> Path:
    """Where the shards for `url` are written first: the same folder for the same command, which so continues after a break.

    Raises ValueError for a store that cannot be written, and for a job array without a folder that all its tasks see.
    """
    check_prefix(url)
    if scheme(url) in ("http", "https"):
        raise ValueError(
            f"--out {url}: https:// can be read alone; write to s3://, gs://, az:// or hf://, or to a folder"
        )
    if given is None and num_tasks > 1:
        raise ValueError("--num-tasks with --out in a store needs --staging, a folder that all tasks share")
    name = f"multicrop-hjepa-staging-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"
    return given or Path(tempfile.gettempdir()) / name


def upload_split(folder: Path, url: str) -> int:
    """Upload what the store does not have yet of a finished split; returns how many files that were.

    Raises ValueError when the prefix holds other shards, StoreError when the store fails.
    """
    manifest = (folder / MANIFEST_NAME).read_bytes()
    tars = [entry["name"] for entry in json.loads(manifest)["shards"]]
    if _check_prefix(url, manifest, tars):
        return 0
    last = (*INDEX_FILES, MANIFEST_NAME)
    beside = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in (".json", ".jsonl")]
    first = [*tars, *(str(Path(name).with_suffix(".idx")) for name in tars), *(n for n in beside if n not in last)]
    marks = folder / RECORD_FOLDER / UPLOADED_NAME
    done = set(marks.read_text().splitlines()) if marks.exists() else set()
    there = sizes(url) or {}

    def put(name: str) -> int:
        size = (folder / name).stat().st_size
        mark = f"{url} {name} {size}"
        if mark in done and there.get(name) == size:
            return 0
        upload(folder / name, join(url, name), RETRY_S)
        with marks.open("a") as file:
            file.write(f"{mark}\n")
        return 1

    with ThreadPoolExecutor(STREAMS) as pool:
        written = sum(pool.map(put, first))
    for name in last:
        upload(folder / name, join(url, name), RETRY_S)
    return written + len(last)


def _check_prefix(url: str, manifest: bytes, tars: list[str]) -> bool:
    """Whether this conversion is there already, whole."""
    try:
        found = read(join(url, MANIFEST_NAME))
    except MissingObject:
        found = b""
    foreign = sorted(name for name in sizes(url) or {} if name.endswith(".tar") and name not in tars)
    if found not in (b"", manifest) or foreign:
        raise ValueError(
            f"{url}: holds other shards ({foreign[0] if foreign else MANIFEST_NAME}): choose another --out"
        )
    return found == manifest
