"""Checks and indexes existing shards, ours or from another writer."""

import logging
import re
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.files import file_checksum
from pipeline.shards.index import INDEX_NAME, UNLABELLED, ShardIndex, open_index, save_index, scan_shard, tar_names, tar_sizes
from pipeline.shards.manifest import MANIFEST_NAME, Manifest, check_class_count, check_fits, read_manifest
from pipeline.shards.tar import tar_members
from pipeline.text import truncate_list
from tools.own_process import in_parallel

log = logging.getLogger(__name__)


def split_folders(folder: Path) -> list[Path]:
    """Return the folders with shards: the folder itself and its subfolders. Raises FileNotFoundError when there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    folders = [item for item in (folder, *sorted(folder.iterdir())) if tar_names(item) or (item / MANIFEST_NAME).exists()]
    if not folders:
        raise FileNotFoundError(f"{folder}: no shards (*.tar) here or one folder below")
    return folders


def verify_split(folder: Path, workers: int) -> list[str]:
    """Check sums and index against the tars, and decode every image; returns the problems, one line each."""
    try:
        manifest, index = read_manifest(folder) or Manifest(), open_index(folder)
        check_class_count(folder, index.samples["label"], manifest)
    except ValueError as error:
        return [str(error)]
    found = in_parallel(workers, partial(_verify_shard, index, manifest.checksums), range(len(index.shards)))
    return [problem for problems in found for problem in problems]


def _verify_shard(index: ShardIndex, checksums: dict[str, str], shard: int) -> list[str]:
    """Return the problems of one tar. `checksums`: from the manifest."""
    from pipeline.crops.device import find_faults  # DALI takes a second to import

    problems, path, rows = [], index.shard_path(shard), np.flatnonzero(index.samples["shard"] == shard)
    if (sha256 := checksums.get(path.name)) and file_checksum(path) != sha256:
        problems.append(f"{path}: sha256 differs from {MANIFEST_NAME}: damaged, or another conversion")
    try:
        scanned = scan_shard(path, shard)
    except ValueError as error:
        return [*problems, str(error)]
    if not np.array_equal(scanned, index.samples[rows]):
        return [*problems, f"{path}: {INDEX_NAME} does not describe this tar: run `make_shards.py index` on its folder"]
    # The decoder names an image by its row, a person finds it by its name in the tar.
    names = {member.offset: member.name for member in tar_members(path)}
    faults = find_faults(index, rows.tolist(), "cpu")
    return problems + [f"{path}: {names[int(index.samples['offset'][row])]}: {fault}" for row, fault in faults.items()]


def index_split(folder: Path, workers: int) -> int:
    """Write the index by scanning headers; returns the number of samples."""
    tars = [folder / name for name in tar_names(folder)]
    sizes = tar_sizes(folder, [tar.name for tar in tars])
    scans = list(in_parallel(workers, scan_shard, tars, range(len(tars))))
    check_fits(folder, read_manifest(folder), sizes, sum(map(len, scans)))
    names = {re.sub(r"-?\d+$", "", tar.stem) for tar in tars}
    if len(names) > 1 and max(int(scan["label"].max(initial=UNLABELLED)) for scan in scans) > 0:
        listed = truncate_list(sorted(names))
        log.warning(f"{folder}: tars of {len(names)} sets ({listed}); if their labels mean different classes, keep them apart")
    save_index(folder, [tar.name for tar in tars], np.concatenate(scans))
    return sum(map(len, scans))
