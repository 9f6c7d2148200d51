"""Hugging Face parquet shards: a column `image` with `bytes`, and a column `label`.

A global shuffle reads images in random order, and parquet can only be read a row group (hundreds of images) at a time. So each
file's images are first copied, as they are, into a spool file beside the shards; the spools go when the split is complete.
"""

import fcntl
import json
import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards.index import UNLABELLED
from tools.shards.catalogue import Catalogue, FileRanges, Source, check_class_names
from tools.shards.layouts.folders import plain_name, split_root
from tools.shards.writer import PartialFile

BATCH_ROWS = 64
ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])


def find_parquet(path: Path, split: str) -> str:
    files = _files(path, split)
    return f"{len(files)} parquet files" if files else ""


def _files(path: Path, split: str) -> list[Path]:
    """One file, or those of a folder or its `data`; where some are named after a split, only those of ours."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    root = split_root(path, split)
    found = [file for folder in (root, path / "data") if folder for file in sorted(folder.glob("*.parquet"))]
    named = {"train": "train", "val": "val(idation)?"}[split]
    ours = [file for file in found if re.match(rf"{named}[-_.]", file.name)]
    others = [file for file in found if re.match(r"(train|val|validation|test)[-_.]", file.name)]
    return ours or [file for file in found if file not in others]


def _pyarrow() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ValueError("parquet files need pyarrow, which is not installed: pip install -e .[parquet]") from None


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
        """Copy the images once, whoever asks; returns where each one lies, `[N]` of ROW."""
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
        """As `fill`, but a spool that has been emptied after use is not filled again for it."""
        rows_path = self.spool.with_suffix(".npy")
        return np.load(rows_path) if rows_path.exists() else self.fill()


def _copy_images(path: Path, file: PartialFile) -> np.ndarray:
    rows = []
    try:
        parquet = _pyarrow().ParquetFile(path)
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


def open_parquet(path: Path, split: str, work: Path | None) -> Source:
    files = _files(path, split)
    containers = [SpooledParquet(file, (work or path) / f"{i:05d}.spool") for i, file in enumerate(files)]
    catalogue = Catalogue(list(containers))
    for container, spooled in enumerate(containers):
        rows = spooled.rows() if work else _estimated_rows(spooled.path)
        for number, (offset, size, label) in enumerate(rows.tolist()):
            catalogue.add(container, offset, size, label, f"{spooled.path.name}/{number:06d}")
    classes = _class_names(files[0])
    check_class_names(classes, str(files[0]))
    return Source("parquet", plain_name(path), catalogue, tuple(classes), notes=(f"{len(files)} parquet files",))


def _estimated_rows(path: Path) -> np.ndarray:
    """For a dry run: as many rows as the file has, each of the mean size; nothing is copied and nothing can be read."""
    meta = _pyarrow().ParquetFile(path).metadata
    rows = np.zeros(meta.num_rows, ROW)
    rows["size"] = path.stat().st_size // max(meta.num_rows, 1)
    return rows


def _class_names(path: Path) -> list[str]:
    """The names that `datasets` keeps in the schema's metadata, where there are any."""
    metadata = _pyarrow().ParquetFile(path).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return [str(name) for name in features.get("label", {}).get("names", [])]
    except (ValueError, AttributeError):
        return []


def empty_spools(work: Path) -> None:
    """Give the disk space back; the small lists of rows stay, so that a later run need not read the parquet again."""
    for spool in work.glob("*.spool"):
        spool.unlink()
