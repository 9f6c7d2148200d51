"""Parquet files with a column of images, as of Hugging Face: `image.bytes`, or encoded images themselves.

A global shuffle reads images in random order, and parquet can only be read a row group (hundreds of images) at a time. So each
file's images are first copied, unchanged, into a spool file beside the shards; spools are deleted when the split is complete.
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED
from pipeline.shards.tar import is_hidden
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.layouts.parquet_columns import (
    BATCH_ROWS,
    Columns,
    batches,
    find_columns,
    image_bytes,
    open_file,
    read_labels,
)
from tools.shards.layouts.splits import files_of_split, plain_name
from tools.shards.layouts.walk import some
from tools.shards.writer import PartialFile

ROW = np.dtype([("offset", "<i8"), ("size", "<i8")])


def open_parquet(path: Path, split: str, spools: Path | None) -> Source | None:
    """One file, or those of a folder at any depth. Without `spools`, for a dry run, no image is copied."""
    if path.is_file():
        files = [path] if path.suffix == ".parquet" else []
    else:
        found = [file for file in sorted(path.rglob("*.parquet")) if not is_hidden(str(file.relative_to(path)))]
        files = files_of_split(found, split, path)
    columns_of = {file: find_columns(file) for file in files}
    files = [file for file in files if columns_of[file]]
    if not files:
        return None
    columns = _common(columns_of, files)
    _check_one_set(path, files)
    containers = [
        SpooledParquet(file, columns.image, (spools or path) / f"{i:05d}.spool") for i, file in enumerate(files)
    ]
    catalogue = Catalogue(list(containers))
    labels, classes = read_labels(files, columns) if columns.label else ([], ())
    for container, spooled in enumerate(containers):
        rows = spooled.rows()[["offset", "size"]] if spools else _estimated_rows(spooled.path)
        mine = labels[container] if labels else np.full(len(rows), UNLABELLED)
        for number, ((offset, size), label) in enumerate(zip(rows.tolist(), mine.tolist(), strict=True)):
            catalogue.add(container, offset, size, label, f"{spooled.name(path)}/{number:06d}")
    notes = [f"{len(files)} parquet files", columns.note()]
    if others := len(columns_of) - len(files):
        notes.append(f"{others} without images are left out")
    return Source("parquet", plain_name(path), catalogue, classes, notes=tuple(notes))


def _common(columns_of: dict[Path, Columns | None], files: list[Path]) -> Columns:
    """The columns of all files. Raises ValueError where one differs, for its labels would mean something else."""
    first = columns_of[files[0]]
    assert first is not None
    if other := next((file for file in files if columns_of[file] != first), None):
        raise ValueError(f"{other}: other columns or classes than {files[0]}: convert them one by one")
    return first


def _check_one_set(path: Path, files: list[Path]) -> None:
    """Raise ValueError where the files belong to several configurations, as the hub keeps them: `default/train/0000.parquet`."""
    tops = {file.relative_to(path).parts[0] for file in files if len(file.relative_to(path).parts) > 2}
    if len(tops) > 1:
        raise ValueError(f"{path}: parquet files of several sets, {some(sorted(tops))}: give one of these folders")


@dataclass
class SpooledParquet:
    """The images of one parquet file, copied to `spool` on the first read and read from there."""

    path: Path
    column: str
    spool: Path

    def name(self, root: Path) -> str:
        """The file below `root`: two folders may have files of one name."""
        return self.path.name if root == self.path else str(self.path.relative_to(root))

    def read(self, offset: int, size: int, name: str) -> bytes:
        if not hasattr(self, "_ranges"):
            self.fill()
            self._ranges = FileRanges(self.spool)
        return self._ranges.read(offset, size, name)

    def fill(self) -> np.ndarray:
        """Copy the images once, whichever process asks first; returns where each one lies, `[N]` of ROW."""
        self.spool.parent.mkdir(parents=True, exist_ok=True)
        with self.spool.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows_path = self.spool.with_suffix(".npy")
            if self.spool.exists() and rows_path.exists():
                return np.load(rows_path)
            with PartialFile(self.spool) as file:
                rows = _copy_images(self.path, self.column, file)
            with PartialFile(rows_path) as file, os.fdopen(os.dup(file.descriptor), "wb") as stream:
                np.save(stream, rows)
            return rows

    def rows(self) -> np.ndarray:
        """As `fill`, but does not fill again a spool that was deleted after use."""
        rows_path = self.spool.with_suffix(".npy")
        return np.load(rows_path) if rows_path.exists() else self.fill()


def _copy_images(path: Path, column: str, file: PartialFile) -> np.ndarray:
    rows = []
    for values in batches(path, column, BATCH_ROWS):
        for value in values:
            content = image_bytes(value)
            rows.append((file.num_bytes, len(content)))
            file.write([content])
    if rows and not file.num_bytes:
        raise ValueError(
            f"{path}: column {column} holds no image at all, perhaps paths: embed the images, or convert their files"
        )
    return np.array(rows, ROW)


def _estimated_rows(path: Path) -> np.ndarray:
    """As many rows as the file has, each of the mean size; their images cannot be read."""
    rows = np.zeros(open_file(path).metadata.num_rows, ROW)
    rows["size"] = path.stat().st_size // max(len(rows), 1)
    return rows


def delete_spools(folder: Path) -> None:
    """Free the disk space; the small lists of rows stay, so that a later run need not read the parquet again."""
    for spool in folder.glob("*.spool"):
        spool.unlink()
