"""Uploads shards that were converted for an object store: staged on a disk first, index and manifest uploaded last."""

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.shards.index_file import INDEX_FILES
from pipeline.shards.manifest import MANIFEST_NAME, MAX_JSON_BYTES
from pipeline.shards.storage import MissingObject, check_prefix, join, read_whole, scheme, sizes, upload
from tools.shards.writer import RECORD_FOLDER

# One stream seldom fills a connection; a store that fails for two minutes needs a person.
NUM_STREAMS = 4
RETRY_S = 120.0
UPLOADED_NAME = "uploaded.txt"


def staging_folder(url: str, requested: Path | None, num_tasks: int) -> Path:
    """Return where the shards for `url` are staged: the same folder for the same command, so that it can be continued.

    Raises ValueError for a store that cannot be written, and for a job array whose tasks share no folder.
    """
    check_prefix(url)
    if scheme(url) in ("http", "https"):
        raise ValueError(f"--out {url}: https:// is read-only; write to s3://, gs://, az:// or hf://, or to a folder")
    if requested is None and num_tasks > 1:
        raise ValueError("--num-tasks with --out in a store needs --staging, a folder that all tasks share")
    name = f"multicrop-hjepa-{os.getuid()}-staging-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"
    return requested or Path(tempfile.gettempdir()) / name


def upload_split(folder: Path, url: str) -> int:
    """Upload the files of a finished split that the store lacks; returns how many.

    Raises ValueError when the prefix holds other shards, StoreError when the store fails.
    """
    manifest = (folder / MANIFEST_NAME).read_bytes()
    tars = [entry["name"] for entry in json.loads(manifest)["shards"]]
    stored_sizes = sizes(url) or {}
    try:
        stored_manifest = read_whole(join(url, MANIFEST_NAME), MAX_JSON_BYTES)
    except MissingObject:
        stored_manifest = b""
    foreign = sorted(name for name in stored_sizes if name.endswith(".tar") and name not in tars)
    if stored_manifest not in (b"", manifest) or foreign:
        raise ValueError(f"{url}: holds other shards ({[*foreign, MANIFEST_NAME][0]}): choose another --out")
    if stored_manifest:
        return 0
    last = (*INDEX_FILES, MANIFEST_NAME)
    side_files = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".jsonl"))
    first = [name for name in (*tars, *side_files) if name not in last]
    # An object can have the size of a file but the content of an earlier conversion; the log tells what was uploaded.
    log_path = folder / RECORD_FOLDER / UPLOADED_NAME
    uploaded = set(log_path.read_text().splitlines()) if log_path.exists() else set()

    def put(name: str) -> int:
        size = (folder / name).stat().st_size
        entry = f"{url} {name} {size}"
        if entry in uploaded and stored_sizes.get(name) == size:
            return 0
        upload(folder / name, join(url, name), RETRY_S)
        with log_path.open("a") as file:
            file.write(f"{entry}\n")
        return 1

    # A reader finds the split by its index and manifest: they come last, so that it never reads half a data set.
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        written = sum(pool.map(put, first))
    for name in last:
        upload(folder / name, join(url, name), RETRY_S)
    return written + len(last)
