"""Checks, indexes and describes existing shards, ours or from another writer."""

import hashlib
import logging
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_atomic
from pipeline.shards.index import INDEX_NAME, ShardIndex, open_index, save_index, scan_shard
from pipeline.shards.manifest import MANIFEST_NAME, check_class_count, read_manifest, read_object
from pipeline.shards.tar import is_hidden, sample_key, tar_members
from tools.shards.images import RejectedImageError, pixel_sums
from tools.shards.report import INFO_NAME, STATS_NAME, describe_rows, find_duplicates, mean_and_std, timm_info
from tools.shards.writer import BATCH_IMAGES, IdxMember, fingerprint, idx_content, pixel_stride

log = logging.getLogger(__name__)

BLANKS = re.compile(r"\s")
INDEX_AGAIN = "run `make_shards.py index` on its folder"


@dataclass(frozen=True)
class ShardTask:
    """One shard to read. `rows`: its rows in the index. `sha256`: from the manifest, "" without one."""

    path: Path
    shard: int
    rows: np.ndarray
    sha256: str = ""

    def images(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for row in self.rows:
                file.seek(int(row["offset"]))
                yield file.read(int(row["size"]))


def split_folders(folder: Path) -> list[Path]:
    """Return the folders with shards: the folder itself and its subfolders. Raises FileNotFoundError when there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    candidates = [folder, *sorted(item for item in folder.iterdir() if item.is_dir())]
    folders = [item for item in candidates if next(item.glob("*.tar"), None) or (item / MANIFEST_NAME).exists()]
    if not folders:
        raise FileNotFoundError(f"{folder}: no shards (*.tar) here or one folder below")
    return folders


def verify_split(folder: Path, workers: int) -> list[str]:
    """Check sums, index and .idx against the tars, and decode every image; returns the problems, one line each."""
    try:
        manifest = read_manifest(folder)
        checksums = manifest.checksums if manifest else {}
        if missing := [name for name in checksums if not (folder / name).exists()]:
            return [f"{folder / name}: listed in {MANIFEST_NAME} but missing" for name in missing]
        index = open_index(folder)
        if manifest:
            check_class_count(folder, index.samples["label"], manifest)
    except ValueError as error:
        return [str(error)]
    foreign = set(checksums) ^ set(index.shards) if checksums else set()
    problems = [f"{folder / name}: in only one of {MANIFEST_NAME} and {INDEX_NAME}" for name in sorted(foreign)]
    expected = manifest.num_samples if manifest else None
    if expected not in (None, len(index)):
        problems.append(f"{folder / INDEX_NAME}: {len(index)} samples, but {MANIFEST_NAME} says {expected}")
    return problems + [
        line for lines in _in_parallel(_verify_shard, _tasks(index, checksums), workers) for line in lines
    ]


def _tasks(index: ShardIndex, checksums: dict[str, str]) -> list[ShardTask]:
    rows = np.split(index.samples, np.cumsum(index.counts)[:-1])
    return [
        ShardTask(index.shard_path(shard), shard, rows[shard], checksums.get(name, ""))
        for shard, name in enumerate(index.shards)
    ]


def _verify_shard(task: ShardTask) -> list[str]:
    from tools.shards.decode_check import decode_errors  # DALI takes a second to import

    problems = []
    with task.path.open("rb") as file:
        if task.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != task.sha256:
            problems.append(f"{task.path}: sha256 differs from {MANIFEST_NAME}: damaged, or another conversion")
    try:
        rows, idx = scan_shard(task.path, task.shard), scan_idx(task.path)
    except ValueError as error:
        return [*problems, str(error)]
    if not np.array_equal(rows, task.rows):
        problems.append(f"{task.path}: {INDEX_NAME} does not describe this tar: {INDEX_AGAIN}")
    idx_path = task.path.with_suffix(".idx")
    if idx_path.exists() and idx_path.read_bytes() != idx:
        problems.append(f"{idx_path}: does not describe its tar: {INDEX_AGAIN}")
    names = {member.offset: member.name for member in tar_members(task.path)}
    for start in range(0, len(rows), BATCH_IMAGES):  # bounds the memory
        batch = rows[start : start + BATCH_IMAGES]
        contents = ShardTask(task.path, task.shard, batch).images()
        errors = decode_errors(list(zip(contents, batch["height"].tolist(), batch["width"].tolist(), strict=True)))
        faulty = zip(batch["offset"].tolist(), errors, strict=True)
        problems += [f"{task.path}: {names[offset]}: {reason}" for offset, reason in faulty if reason]
    return problems


def index_split(folder: Path, workers: int) -> int:
    """Write the index, each tar's .idx and timm's info file by scanning headers; returns the number of samples."""
    tars = sorted(folder.glob("*.tar"))
    tasks = [ShardTask(tar, shard, np.empty(0)) for shard, tar in enumerate(tars)]
    scans = list(_in_parallel(_index_shard, tasks, workers))
    names, lengths = [tar.name for tar in tars], [len(rows) for rows in scans]
    save_index(folder, names, np.concatenate(scans))
    if not (folder / INFO_NAME).exists():
        write_atomic(folder / INFO_NAME, timm_info(folder.name, folder.name, names, lengths))
    return sum(lengths)


def _index_shard(task: ShardTask) -> np.ndarray:
    rows = scan_shard(task.path, task.shard)
    write_atomic(task.path.with_suffix(".idx"), scan_idx(task.path))
    return rows


def scan_idx(path: Path) -> bytes:
    """Build DALI's index of any WebDataset tar: lower-case extensions, the members of one sample together.

    The format cannot hold blanks in names; underscores replace them.
    """
    samples: dict[str, list[IdxMember]] = {}
    for member in tar_members(path):
        key, extension = sample_key(member.name)
        if extension and key.rpartition("/")[2] and not is_hidden(member.name):
            name = BLANKS.sub("_", member.name)
            samples.setdefault(key, []).append((BLANKS.sub("_", extension), member.offset, member.size, name))
    return idx_content(list(samples.values()))


def stats_split(folder: Path, workers: int) -> dict[str, Any]:
    """Return the content of `stats.json`, computed from the tars where the file is missing."""
    if (folder / STATS_NAME).exists():
        return read_object(folder / STATS_NAME, "Remove it, and it is computed from the tars")
    index = open_index(folder)
    fingerprints, sums = zip(*_in_parallel(_describe_shard, _tasks(index, {}), workers), strict=True)
    duplicates = find_duplicates(folder, list(index.shards), index.samples, np.concatenate(fingerprints))
    return describe_rows(index.samples, ()) | mean_and_std(list(sums)) | {"duplicates": duplicates}


def _describe_shard(task: ShardTask) -> tuple[np.ndarray, np.ndarray]:
    fingerprints, sums = [], np.zeros(7, np.int64)
    for number, content in enumerate(task.images()):
        fingerprints.append(fingerprint(content))
        if number % pixel_stride(len(task.rows)) == 0:
            try:
                sums += pixel_sums(content)
            except RejectedImageError as error:
                where = f"{task.path}: the image at byte {task.rows[number]['offset']}"
                log.warning("%s %s: left out of mean and std", where, error)
    return np.frombuffer(b"".join(fingerprints), "S16"), sums


def _in_parallel(work: Callable[[ShardTask], Any], tasks: list[ShardTask], workers: int) -> Iterator[Any]:
    if workers == 1 or len(tasks) == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(work, tasks)
