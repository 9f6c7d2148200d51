"""Check, index and describe shards that are already there, our own or somebody else's."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards.index import INDEX_NAME, open_index, save_index, scan_shard
from tools.shards.images import pixel_sums
from tools.shards.layouts.tar_members import tar_members
from tools.shards.report import INFO_NAME, MANIFEST_NAME, STATS_NAME, describe_rows, dump, find_duplicates, mean_and_std
from tools.shards.writer import fingerprint, pixel_stride, write_file

DECODE_BATCH = 32


@dataclass(frozen=True)
class ShardTask:
    """One shard to look at. `rows`: what the index says of it; `sha256`: what the manifest says, "" without one."""

    path: Path
    shard: int
    rows: np.ndarray
    sha256: str


def split_folders(folder: Path) -> list[Path]:
    """The folder itself, or its subfolders that hold shards. Raises FileNotFoundError when there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    candidates = [folder, *sorted(item for item in folder.iterdir() if item.is_dir())]
    found = [item for item in candidates if next(item.glob("*.tar"), None) or (item / MANIFEST_NAME).exists()]
    if not found:
        raise FileNotFoundError(f"{folder}: no shards (*.tar) here or one folder below")
    return found


def verify_split(folder: Path, workers: int) -> list[str]:
    """Checksums, index against tar, .idx against tar, full decode: the problems found, one line each."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text()) if (folder / MANIFEST_NAME).exists() else {"shards": []}
    sums = {entry["name"]: entry["sha256"] for entry in manifest["shards"]}
    missing = [
        f"{folder / name}: listed in {MANIFEST_NAME} but missing" for name in sums if not (folder / name).exists()
    ]
    if missing:
        return missing
    try:
        index = open_index(folder)
    except ValueError as error:
        return [str(error)]
    foreign = set(sums) ^ set(index.shards) if sums else set()
    problems = [f"{folder / name}: in only one of {MANIFEST_NAME} and {INDEX_NAME}" for name in sorted(foreign)]
    if manifest.get("num_samples", len(index)) != len(index):
        problems.append(f"{folder / INDEX_NAME}: {len(index)} samples, {MANIFEST_NAME} says {manifest['num_samples']}")
    tasks = [
        ShardTask(index.shard_path(k), k, index.samples[index.samples["shard"] == k], sums.get(name, ""))
        for k, name in enumerate(index.shards)
    ]
    return problems + [line for lines in _in_parallel(_verify_shard, tasks, workers) for line in lines]


def _verify_shard(task: ShardTask) -> list[str]:
    from tools.shards.decode_check import decode_errors

    problems = []
    with task.path.open("rb") as file:
        if task.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != task.sha256:
            problems.append(f"{task.path}: sha256 differs from {MANIFEST_NAME}: damaged, or another conversion")
    try:
        rows = scan_shard(task.path, task.shard)
        idx = dali_index(task.path)
    except ValueError as error:
        return [*problems, str(error)]
    if not np.array_equal(rows, task.rows):
        problems.append(
            f"{task.path}: {INDEX_NAME} does not describe this tar: run `make_shards.py index` on its folder"
        )
    idx_path = task.path.with_suffix(".idx")
    if idx_path.exists() and idx_path.read_bytes() != idx:
        problems.append(f"{idx_path}: does not describe its tar: run `make_shards.py index` on its folder")
    names = {member.offset: member.name for member in tar_members(task.path)}
    with task.path.open("rb") as file:
        for start in range(0, len(rows), DECODE_BATCH):
            batch = rows[start : start + DECODE_BATCH]
            images = []
            for row in batch:
                file.seek(int(row["offset"]))
                images.append((file.read(int(row["size"])), int(row["height"]), int(row["width"])))
            found = zip(batch, decode_errors(images), strict=True)
            problems += [f"{task.path}: {names[int(row['offset'])]}: {error}" for row, error in found if error]
    return problems


def index_split(folder: Path, workers: int) -> int:
    """Write index.npz, each tar's .idx and timm's info file by scanning headers; returns the number of samples."""
    tars = sorted(folder.glob("*.tar"))
    empty = np.empty(0)
    scans = list(_in_parallel(_index_shard, [ShardTask(tar, k, empty, "") for k, tar in enumerate(tars)], workers))
    names = [tar.name for tar in tars]
    save_index(folder, names, np.concatenate(scans))
    if not (folder / INFO_NAME).exists():
        split = {"name": folder.name, "num_samples": sum(map(len, scans)), "filenames": names}
        split["shard_lengths"] = [len(scan) for scan in scans]
        write_file(folder / INFO_NAME, dump({"name": folder.name, "splits": {folder.name: split}}))
    return sum(map(len, scans))


def _index_shard(task: ShardTask) -> np.ndarray:
    rows = scan_shard(task.path, task.shard)
    write_file(task.path.with_suffix(".idx"), dali_index(task.path))
    return rows


def dali_index(path: Path) -> bytes:
    """DALI's `v1.2` index of any WebDataset tar; extensions in lower case, members of a sample brought together."""
    samples: dict[str, list[str]] = {}
    for member in tar_members(path):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.rpartition(".")
        if dot and stem and " " not in member.name:
            entry = f"{extension.lower()} {member.offset} {member.size} {member.name}"
            samples.setdefault(f"{folder}/{stem}", []).append(entry)
    return "\n".join([f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples.values()), ""]).encode()


def stats_split(folder: Path, workers: int) -> dict[str, Any]:
    """What `stats.json` of our own shards says; computed from the tars where there is none."""
    if (folder / STATS_NAME).exists():
        return json.loads((folder / STATS_NAME).read_text())
    index = open_index(folder)
    tasks = [
        ShardTask(index.shard_path(k), k, index.samples[index.samples["shard"] == k], "")
        for k in range(len(index.shards))
    ]
    contents = list(_in_parallel(_describe_shard, tasks, workers))
    prints = np.concatenate([prints for prints, _ in contents])
    stats = describe_rows(index.samples, ()) | mean_and_std([sums for _, sums in contents])
    return stats | {"duplicates": find_duplicates(folder, list(index.shards), index.samples, prints)}


def _describe_shard(task: ShardTask) -> tuple[np.ndarray, list[list[int]]]:
    prints, totals = [], [[0], [0, 0, 0], [0, 0, 0]]
    with task.path.open("rb") as file:
        for number, row in enumerate(task.rows):
            file.seek(int(row["offset"]))
            content = file.read(int(row["size"]))
            prints.append(fingerprint(content))
            if number % pixel_stride(len(task.rows)) == 0:
                count, sums, squares = pixel_sums(content)
                totals = [
                    [a + b for a, b in zip(*pair, strict=True)]
                    for pair in zip(totals, ([count], sums, squares), strict=True)
                ]
    return np.frombuffer(b"".join(prints), "S16"), totals


def _in_parallel(work: Callable[[ShardTask], Any], tasks: list[ShardTask], workers: int) -> Iterator[Any]:
    context = multiprocessing.get_context("fork")
    if workers == 1 or len(tasks) == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), context) as pool:
        yield from pool.map(work, tasks)
