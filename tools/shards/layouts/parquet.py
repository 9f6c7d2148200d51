"""Parquet files with a column of images, such as those on the Hugging Face hub: structs with `bytes`, or encoded images.

Shards hold images in random order, but parquet is decoded one row group, hundreds of images, at a time. The images are thus
copied unchanged into one spool file next to the shards, once; it is deleted when the split is complete.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.files import partial_file
from pipeline.lock import locked
from pipeline.shards.index import UNLABELLED
from pipeline.shards.samples import LABEL_NAMES, Label, label_of
from pipeline.shards.tar import is_hidden
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.classes import number_labels
from tools.shards.decoding.pixels import RejectedImageError
from tools.shards.images import ImagePolicy, check_image
from tools.shards.layouts.folders import has_images
from tools.shards.layouts.splits import files_of_split, plain_name

IMAGE_ROWS, LABEL_ROWS = 64, 1 << 16  # rows that are decoded at once; bounds the memory
IMAGE_NAMES = (
    "image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes",
)  # fmt: skip
BINARY_TYPES = ("binary", "large_binary")
# pyarrow raises these on damaged files; its own errors derive from them.
PARQUET_ERRORS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class Columns(NamedTuple):
    """The columns to read. `label` is "" without labels; `names` are the classes in the metadata of `datasets`, if any."""

    image: str
    label: str
    names: tuple[str, ...]


def spool(files: list[Path], column: str, folder: Path) -> tuple[Path, list[list[int]]]:
    """Copy the images of all files to one in `folder`, unless that was done before; return it, and the sizes by file."""
    key = hashlib.sha256(str([(path.name, path.stat().st_size) for path in files]).encode()).hexdigest()[:16]
    target, sizes_file = folder / f"{key}.spool", folder / f"{key}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):  # one process copies, the others wait for it
        if not target.exists():
            with partial_file(target) as file:
                sizes = [np.array(list(map(file.write, _contents(path, column))), np.int64) for path in files]
                with partial_file(sizes_file) as other:
                    np.savez(other, *sizes)
    with np.load(sizes_file, allow_pickle=False) as arrays:
        return target, [arrays[name].tolist() for name in arrays.files]


def _contents(path: Path, column: str) -> Iterator[bytes]:
    """Yield the image of each row, b"" for a row without one. Raises ValueError for a file without any image."""
    rows = num_bytes = 0
    for value in read_column(path, column, IMAGE_ROWS):
        content = (value.get("bytes") if isinstance(value, dict) else value) or b""
        rows, num_bytes = rows + 1, num_bytes + len(content)
        yield content
    if rows and not num_bytes:
        raise ValueError(
            f"{path}: column {column} holds no image at all, perhaps paths: embed the images, or convert their files"
        )


def open_parquet(path: Path, split: str, spools: Path) -> Source | None:
    """Open one file, or those of a folder at any depth, and copy their images to `spools`."""
    if path.is_file():
        files = [path] if path.suffix == ".parquet" else []
    else:
        visible = [file for file in sorted(path.rglob("*.parquet")) if not is_hidden(str(file.relative_to(path)))]
        files = files_of_split(visible, split, path)
    columns_of = {file: columns for file in files if (columns := find_columns(file))}
    if files and not columns_of and (path.is_file() or not (has_images(path) or any(path.rglob("*.tar")))):
        there = ", ".join(f"{field.name} ({field.type})" for field in open_file(files[0]).schema_arrow)
        raise ValueError(
            f"{files[0]}: no column holds image files; its columns are {there}. Needed are their bytes, in a binary column or "
            "the field `bytes` of a struct: decode base64 text; where there are names of files, convert those with --labels"
        )
    num_others, files = len(files) - len(columns_of), list(columns_of)
    if not files:
        return None
    columns = columns_of[files[0]]
    if other := next((file for file in files if columns_of[file] != columns), None):
        raise ValueError(f"{other}: other columns or classes than {files[0]}: convert them one by one")
    # The hub keeps the configurations of a data set apart: `default/train/0000.parquet`.
    tops = {file.relative_to(path).parts[0] for file in files if len(file.relative_to(path).parts) > 2}
    if len(tops) > 1:
        raise ValueError(f"{path}: parquet files of several sets, {truncate_list(sorted(tops))}: convert one of them")
    labels, classes, note = read_labels(files, columns) if columns.label else ([], (), "")
    target, all_sizes = spool(files, columns.image, spools)
    catalogue, offset = Catalogue([FileRanges(target)]), 0
    for file, sizes in zip(files, all_sizes, strict=True):
        name = file.name if file == path else str(file.relative_to(path))  # two folders can have files of one name
        for row, size in enumerate(sizes):
            label = labels[len(catalogue)] if labels else UNLABELLED
            catalogue.add(0, offset, size, label, f"{name}/{row:06d}")
            offset += size
    unlabelled = f"no labels: no column is called {', '.join(LABEL_NAMES)}"
    labels_from = f"labels from {columns.label}{note}" if columns.label else unlabelled
    notes = [plural(len(files), "parquet file"), f"images from the column {columns.image}, {labels_from}"]
    if num_others:
        notes.append(f"{num_others} without images are left out")
    return Source("parquet", plain_name(path), catalogue, classes, notes=tuple(notes))


def open_file(path: Path) -> Any:
    """Open with pyarrow. Raises ValueError for a file that is not parquet, and where pyarrow is not installed."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: parquet files need pyarrow, which is not installed: pip install -e .[parquet]. If the images are in "
            "other files next to it, choose their --layout: tars, folders or flat"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except PARQUET_ERRORS as error:
        reason = _first_line(error)
        raise ValueError(f"{path}: not a readable parquet file ({reason}). Copy or download it again") from None


def find_columns(path: Path) -> Columns | None:
    """Choose the columns by type and usual name. None where no column holds images, as in tables that describe other files."""
    schema = open_file(path).schema_arrow
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]  # of the library `datasets`
    except (LookupError, TypeError, ValueError):
        features = {}
    images = [field.name for field in schema if _holds_images(field)]
    binary = [field.name for field in schema if str(field.type) in BINARY_TYPES]
    images = images or [name for name in binary if _starts_with_image(path, name)]
    if not images:
        return None
    usual = (name for known in IMAGE_NAMES for name in images if name.lower() == known)
    if not (image := next(usual, images[0] if len(images) == 1 else "")):
        raise ValueError(f"{path}: the columns {', '.join(images)} all hold images: keep one, or call one of them image")
    # Class names by column. A file from outside can hold anything here.
    names_of = {
        name: tuple(map(str, feature["names"]))
        for name, feature in (features.items() if isinstance(features, dict) else ())
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }
    classes = [name for name in schema.names if name in names_of]
    label = next((name for name in LABEL_NAMES if name in schema.names), classes[0] if len(classes) == 1 else "")
    return Columns(image, label, names_of.get(label, ()))


def _holds_images(field: Any) -> bool:
    """Return True for a binary column with a usual name, and for a struct with such a field, as `datasets` writes it."""
    if str(field.type).startswith("struct"):
        position = field.type.get_field_index("bytes")
        return position >= 0 and str(field.type.field(position).type) in BINARY_TYPES
    return str(field.type) in BINARY_TYPES and field.name.lower() in IMAGE_NAMES


def _starts_with_image(path: Path, column: str) -> bool:
    """Return True if the first value of a binary column of any name is an image file."""
    first = next((value for value in read_column(path, column, 1) if value), b"")
    try:
        check_image(first, "", ImagePolicy())
        return True
    except RejectedImageError:
        return False


def read_column(path: Path, column: str, batch_rows: int) -> Iterator[Any]:
    """Yield the values of one column. Raises ValueError with file, column and row for damage."""
    file, done = open_file(path), 0
    try:
        for batch in file.iter_batches(batch_rows, columns=[column]):
            yield from (values := batch.column(0).to_pylist())
            done += len(values)
    except PARQUET_ERRORS as error:
        where = f"{path}: column {column}, from row {done:,} on"
        raise ValueError(f"{where}: cannot be read ({_first_line(error)}). Copy or download it again") from None


def read_labels(files: list[Path], columns: Columns) -> tuple[list[int], tuple[str, ...], str]:
    """Return the label of each row of all files, the classes, and a note."""
    found: list[Label] = []
    refused = list[str]()
    for value in (value for path in files for value in read_column(path, columns.label, LABEL_ROWS)):
        try:
            found.append(UNLABELLED if value is None else label_of(value))
        except ValueError:
            refused.append(f"{str(value)[:40]!r} in row {len(found):,}")
            found.append(UNLABELLED)
    labels, names = number_labels(found)
    note = f", {len(refused):,} of which are not one number or one name, such as {refused[0]}" if refused else ""
    return labels, names or columns.names, note


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
