"""Checks and indexes existing shards, ours or from another writer; and what a person should know of new ones."""

import logging
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.files import file_checksum
from pipeline.shards.index import INDEX_NAME, UNLABELLED, ShardIndex, open_index, save_index, scan_shard, tar_names, tar_sizes
from pipeline.shards.manifest import MANIFEST_NAME, Manifest, check_class_count, check_fits, read_manifest
from pipeline.text import truncate_list
from tools.own_process import in_parallel
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER, ShardRecord

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
    found = in_parallel(workers, partial(_verify_shard, index, manifest), range(len(index.shards)))
    return [problem for problems in found for problem in problems]


def _verify_shard(index: ShardIndex, manifest: Manifest, shard: int) -> list[str]:
    """Return the problems of one tar."""
    from pipeline.crops.device import find_faults  # DALI takes a second to import

    problems, path, rows = [], index.shard_path(shard), np.flatnonzero(index.samples["shard"] == shard)
    if any(known.name == path.name and known.sha256 not in ("", file_checksum(path)) for known in manifest.shards):
        problems.append(f"{path}: sha256 differs from {MANIFEST_NAME}: damaged, or another conversion")
    try:
        scanned = scan_shard(path, shard)
    except ValueError as error:
        return [*problems, str(error)]
    if not np.array_equal(scanned, index.samples[rows]):
        return [*problems, f"{path}: {INDEX_NAME} does not describe this tar: run `make_shards.py index` on its folder"]
    faults = find_faults(index, rows.tolist(), "cpu")
    return problems + [f"{index.describe(row)}: {fault}" for row, fault in faults.items()]


def index_split(folder: Path, workers: int) -> int:
    """Write the index by scanning headers; returns the number of samples."""
    names = tar_names(folder)
    sizes = tar_sizes(folder, names)
    samples = np.concatenate(list(in_parallel(workers, scan_shard, [folder / name for name in names], range(len(names)))))
    check_fits(folder, read_manifest(folder), sizes, len(samples))
    sets = sorted({re.sub(r"(-?\d+)?\.tar$", "", name) for name in names})
    if len(sets) > 1 and samples["label"].max(initial=UNLABELLED) > 0:
        listed = truncate_list(sets)
        log.warning(f"{folder}: tars of {len(sets)} sets ({listed}); if their labels mean different classes, keep them apart")
    save_index(folder, names, samples)
    return len(samples)


def remarks(out: Path) -> list[str]:
    """Return a line on each thing in the finished splits that a person should know: changes, degenerate images and labels."""
    lines, in_train = list[str](), np.empty(0, "S16")
    for split in ("train", "val"):
        records_folder = out / split / RECORD_FOLDER
        manifest = read_manifest(out / split) if (records_folder / IDENTITY_NAME).exists() else None
        if manifest is None:
            continue
        records = [ShardRecord.load(records_folder / f"{shard:06d}.npz") for shard in range(len(manifest.shards))]
        digests = np.concatenate([record.digests for record in records])
        labels, counts = np.unique(np.concatenate([record.rows["label"] for record in records]), return_counts=True)
        total, flat = f"{len(digests):,}", [name for record in records for name in record.one_colour]
        all_changes = sum((Counter(record.changes) for record in records), Counter())
        changes = ", ".join(f"{count:,} {kind}" for kind, count in all_changes.most_common())
        copies, shared = len(digests) - len(np.unique(digests)), int(np.isin(digests, in_train).sum())
        single = [manifest.classes[n] if manifest.classes else str(n) for n in labels[(counts == 1) & (labels >= 0)].tolist()]
        texts = {
            f"changed by the rules of docs/pipeline.md: {changes}": changes,
            f"{len(flat):,} of {total} images have one colour: {truncate_list(flat)}": flat,
            f"{copies:,} of {total} images are copies of others": copies,
            f"{shared:,} of {total} images are also in train, which flatters accuracies": shared,
            f"classes with a single image: {truncate_list(single)}": single and split == "train",
            "all images have one label, so accuracies will mean nothing": len(labels) == 1 and labels[0] >= 0,
        }
        lines += [f"{split}: {text}" for text, applies in texts.items() if applies]
        in_train = digests
    return lines
