"""Checks, indexes and describes existing shards, ours or from another writer."""

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.files import file_checksum
from pipeline.shards.index import INDEX_NAME, ShardIndex, open_index, save_index, scan_shard
from pipeline.shards.manifest import MANIFEST_NAME, Manifest, check_class_count, read_manifest, read_object
from pipeline.shards.samples import PILLOW_FAULTS
from pipeline.shards.tar import tar_members
from tools.shards.decoding.pixels import pixel_sums
from tools.shards.report import STATS_NAME, describe_images
from tools.shards.writer import BATCH_IMAGES, fingerprint, pixel_stride

log = logging.getLogger(__name__)

T = TypeVar("T")


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
    """Check sums and index against the tars, and decode every image; returns the problems, one line each."""
    try:
        manifest = read_manifest(folder) or Manifest()
        if missing := [name for name in manifest.checksums if not (folder / name).exists()]:
            return [f"{folder / name}: listed in {MANIFEST_NAME} but missing" for name in missing]
        index = open_index(folder)
        check_class_count(folder, index.samples["label"], manifest)
    except ValueError as error:
        return [str(error)]
    checksums = manifest.checksums
    foreign = set(checksums) ^ set(index.shards) if checksums else set()
    problems = [f"{folder / name}: in only one of {MANIFEST_NAME} and {INDEX_NAME}" for name in sorted(foreign)]
    if manifest.num_samples not in (None, len(index)):
        problems.append(f"{folder / INDEX_NAME}: {len(index)} samples, but {MANIFEST_NAME} says {manifest.num_samples}")
    expected = [checksums.get(name, "") for name in index.shards]
    for found in _in_parallel(workers, _verify_shard, *_paths_and_rows(index), expected):
        problems += found
    return problems


def _paths_and_rows(index: ShardIndex) -> tuple[list[Path], list[np.ndarray]]:
    paths = [index.shard_path(shard) for shard in range(len(index.shards))]
    return paths, np.split(index.samples, np.cumsum(index.counts)[:-1])


def _verify_shard(path: Path, rows: np.ndarray, sha256: str) -> list[str]:
    """Return the problems of one tar. `rows`: its part of the index. `sha256`: from the manifest, "" without one."""
    from tools.shards.decode_check import decode_errors  # DALI takes a second to import

    problems = []
    if sha256 and file_checksum(path) != sha256:
        problems.append(f"{path}: sha256 differs from {MANIFEST_NAME}: damaged, or another conversion")
    try:
        scanned = scan_shard(path, rows["shard"].max(initial=0))
    except ValueError as error:
        return [*problems, str(error)]
    if not np.array_equal(scanned, rows):
        problems.append(f"{path}: {INDEX_NAME} does not describe this tar: run `make_shards.py index` on its folder")
    # The decoder names an image by its number in a batch, a person finds it by its name in the tar.
    names = {member.offset: member.name for member in tar_members(path)}
    for batch in np.split(scanned, range(BATCH_IMAGES, len(scanned), BATCH_IMAGES)):  # bounds the memory
        sizes = batch["height"].tolist(), batch["width"].tolist()
        errors = decode_errors(list(zip(_contents(path, batch), *sizes, strict=True)))
        bad = [(offset, error) for offset, error in zip(batch["offset"].tolist(), errors, strict=True) if error]
        problems += [f"{path}: {names[offset]}: {reason}" for offset, reason in bad]
    return problems


def _contents(path: Path, rows: np.ndarray) -> Iterator[bytes]:
    """Yield the images of some rows of one tar."""
    with path.open("rb") as file:
        for row in rows:
            file.seek(int(row["offset"]))
            yield file.read(int(row["size"]))


def index_split(folder: Path, workers: int) -> int:
    """Write the index by scanning headers; returns the number of samples."""
    tars = sorted(folder.glob("*.tar"))
    scans = list(_in_parallel(workers, scan_shard, tars, range(len(tars))))
    save_index(folder, [tar.name for tar in tars], np.concatenate(scans))
    return sum(map(len, scans))


def stats_split(folder: Path, workers: int) -> dict[str, Any]:
    """Return the content of `stats.json`, computed from the tars where the file is missing."""
    if (folder / STATS_NAME).exists():
        return read_object(folder / STATS_NAME, "Remove it, and it is computed from the tars")
    index = open_index(folder)
    fingerprints, sums = zip(*_in_parallel(workers, _describe_shard, *_paths_and_rows(index)), strict=True)
    return describe_images(folder, index.shards, index.samples, (), np.concatenate(fingerprints), sums)


def _describe_shard(path: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the fingerprints of the images in one tar, and the sum of the `pixel_sums` of some of them."""
    fingerprints, sums = [], np.zeros(7, np.int64)
    for number, content in enumerate(_contents(path, rows)):
        fingerprints.append(fingerprint(content))
        # As in a conversion, some of the images are enough for mean and std.
        if number % pixel_stride(len(rows)) == 0:
            try:
                sums += pixel_sums(content)
            except PILLOW_FAULTS as error:
                log.warning("%s: the image at byte %d: %s: left out of mean and std", path, rows[number]["offset"], error)
    return np.frombuffer(b"".join(fingerprints), "S16"), sums


def _in_parallel(workers: int, work: Callable[..., T], paths: list[Path], *arguments: Iterable[Any]) -> Iterator[T]:
    """Yield `work(path, ...)` of each shard, computed in at most `workers` processes. `arguments`: as for `map`."""
    if workers == 1 or len(paths) == 1:
        yield from map(work, paths, *arguments)
        return
    with ProcessPoolExecutor(min(workers, len(paths)), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(work, paths, *arguments)
