"""Hugging Face parquet shards: a column `image` with `bytes`, and a column `label`.

A global shuffle reads images in random order, and parquet can only be read a row group (hundreds of images) at a time. So each
file's images are first copied, unchanged, into a spool file beside the shards; spools are deleted when the split is complete.
"""

import fcntl
import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards.index import UNLABELLED
from tools.shards.catalogue import Catalogue, FileRanges, Source, check_class_names
from tools.shards.layouts.splits import files_of_split, plain_name, split_root
from tools.shards.writer import PartialFile

BATCH_ROWS = 64
ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])


def open_parquet(path: Path, split: str, spools: Path | None) -> Source | None:
    """One file, or those of a folder or its `data`. Without `spools`, for a dry run, nothing is copied."""
    if path.is_file():
        files = [path] if path.suffix == ".parquet" else []
    else:
        folders = (split_root(path, split), path / "data")
        files = files_of_split([file for root in folders if root for file in sorted(root.glob("*.parquet"))], split)
    if not files:
        return None
    containers = [SpooledParquet(file, (spools or path) / f"{i:05d}.spool") for i, file in enumerate(files)]
    catalogue = Catalogue(list(containers))
    for container, spooled in enumerate(containers):
        rows = spooled.rows() if spools else _estimated_rows(spooled.path)
        for number, (offset, size, label) in enumerate(rows.tolist()):
            catalogue.add(container, offset, size, label, f"{spooled.path.name}/{number:06d}")
    classes = _class_names(files[0])
    check_class_names(classes, str(files[0]))
    return Source("parquet", plain_name(path), catalogue, tuple(classes), notes=(f"{len(files)} parquet files",))


@dataclass
class SpooledParquet:
    """The images of one parquet file, copied to `spool` on the first read and read from there."""

    path: Path
    spool: Path

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
                rows = _copy_images(self.path, file)
            with PartialFile(rows_path) as file, os.fdopen(os.dup(file.descriptor), "wb") as stream:
                np.save(stream, rows)
            return rows

    def rows(self) -> np.ndarray:
        """As `fill`, but does not fill again a spool that was deleted after use."""
        rows_path = self.spool.with_suffix(".npy")
        return np.load(rows_path) if rows_path.exists() else self.fill()


def _open_file(path: Path) -> Any:
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ValueError("parquet files need pyarrow, which is not installed: pip install -e .[parquet]") from None
    return parquet.ParquetFile(path)


def _copy_images(path: Path, file: PartialFile) -> np.ndarray:
    rows = []
    try:
        parquet = _open_file(path)
        columns = ["image", "label"] if "label" in parquet.schema_arrow.names else ["image"]
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
            labels = batch.column("label").to_pylist() if len(columns) == 2 else [None] * len(batch)
            for image, label in zip(batch.column("image").to_pylist(), labels, strict=True):
                content = (image or {}).get("bytes") or b""
                rows.append((file.num_bytes, len(content), UNLABELLED if label is None else label))
                file.write([content])
    except (KeyError, AttributeError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path}: not a parquet file with image.bytes and label ({error})") from None
    return np.array(rows, ROW)


def _estimated_rows(path: Path) -> np.ndarray:
    """As many rows as the file has, each of the mean size; their images cannot be read."""
    rows = np.zeros(_open_file(path).metadata.num_rows, ROW)
    rows["size"] = path.stat().st_size // max(len(rows), 1)
    return rows


def _class_names(path: Path) -> list[str]:
    """The names that `datasets` keeps in the schema's metadata, where there are any."""
    metadata = _open_file(path).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return [str(name) for name in features.get("label", {}).get("names", [])]
    except (ValueError, AttributeError):
        return []


def delete_spools(folder: Path) -> None:
    """Free the disk space; the small lists of rows stay, so that a later run need not read the parquet again."""
    for spool in folder.glob("*.spool"):
        spool.unlink()
