"""Parquet files with a column of images, such as those on the Hugging Face hub: structs with `bytes`, or encoded images.

Shards hold images in random order, but parquet is decoded one row group, hundreds of images, at a time. The images are thus
copied unchanged into one spool file next to the shards, once; it is deleted when the split is complete.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import partial_file
from pipeline.lock import locked
from pipeline.shards.index import UNLABELLED
from pipeline.shards.index_file import FAULTS
from pipeline.shards.samples import LABEL_NAMES, Label, label_of
from pipeline.shards.tar import is_hidden
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.decoding.pixels import RejectedImageError
from tools.shards.images import ImagePolicy, check_image
from tools.shards.labels import number_labels
from tools.shards.layouts.folders import files_of_split, has_images, plain_name

IMAGE_ROWS, LABEL_ROWS = 64, 1 << 16  # rows that are decoded at once; bounds the memory
IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes")
Columns = tuple[str, str, tuple[str, ...]]  # of the images; of the labels, or ""; and the classes that `datasets` names, if any


def spool(files: Collection[Path], column: str, folder: Path) -> tuple[Path, list[list[int]]]:
    """Copy the images of all files to one in `folder`, unless that was done before; return it, and the sizes by file."""
    key = hashlib.sha256(str([(path.name, path.stat().st_size) for path in files]).encode()).hexdigest()[:16]
    target, sizes_file = folder / f"{key}.spool", folder / f"{key}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):  # one process copies, the others wait for it
        if not target.exists():
            with partial_file(target) as file:
                sizes = [np.array(list(map(file.write, _images(path, column, IMAGE_ROWS))), np.int64) for path in files]
                if empty := [path for path, found in zip(files, sizes, strict=True) if len(found) and not found.any()]:
                    what = f"column {column} holds no image at all, perhaps paths"
                    raise ValueError(f"{empty[0]}: {what}: embed the images, or convert their files")
                with partial_file(sizes_file) as other:
                    np.savez(other, *sizes)
    with np.load(sizes_file, allow_pickle=False) as arrays:
        return target, [arrays[name].tolist() for name in arrays.files]


def _images(path: Path, column: str, batch_rows: int) -> Iterator[bytes]:
    for value in read_column(path, column, batch_rows):
        yield (value.get("bytes") if isinstance(value, dict) else value) or b""


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
    if not columns_of:
        return None
    first, columns = next(iter(columns_of.items()))
    image, label_column, names = columns
    if other := next((file for file in columns_of if columns_of[file] != columns), None):
        raise ValueError(f"{other}: other columns or classes than {first}: convert them one by one")
    # The hub keeps the configurations of a data set apart: `default/train/0000.parquet`.
    tops = {file.relative_to(path).parts[0] for file in columns_of if len(file.relative_to(path).parts) > 2}
    if len(tops) > 1:
        raise ValueError(f"{path}: parquet files of several sets, {truncate_list(sorted(tops))}: convert one of them")
    labels, classes, note = read_labels(columns_of, label_column, names)
    target, all_sizes = spool(columns_of, image, spools)
    catalogue, offset = Catalogue([FileRanges(target)]), 0
    for file, sizes in zip(columns_of, all_sizes, strict=True):
        name = file.name if file == path else str(file.relative_to(path))  # two folders can have files of one name
        for row, size in enumerate(sizes):
            label = labels[len(catalogue)] if labels else UNLABELLED
            catalogue.add(0, offset, size, label, f"{name}/{row:06d}")
            offset += size
    num_others, images = len(files) - len(columns_of), f"images from the column {image}, {note}"
    others = f"{num_others} without images are left out" if num_others else ""
    notes = (plural(len(columns_of), "parquet file"), images, others)
    return Source("parquet", plain_name(path), catalogue, classes, notes=notes)


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
    except FAULTS as error:
        raise ValueError(f"{path}: not a readable parquet file ({_first_line(error)}). Copy or download it again") from None


def find_columns(path: Path) -> Columns | None:
    """Choose the columns by type and usual name. None where no column holds images, as in tables that describe other files."""
    schema = open_file(path).schema_arrow
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for known in IMAGE_NAMES for name in binary if name.lower() == known]
    images = usual[:1] or [name for name in binary if _starts_with_image(path, name)]
    if len(images) > 1:
        raise ValueError(f"{path}: the columns {', '.join(images)} all hold images: keep one, or call one of them image")
    if not images:
        return None
    try:  # the metadata of the library `datasets`; a file from outside can hold anything here
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"].items()
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        features = ()
    classes = {name: kind["names"] for name, kind in features if isinstance(kind, dict) and isinstance(kind.get("names"), list)}
    named = [name for name in schema.names if name in classes]
    label = next((name for name in LABEL_NAMES if name in schema.names), named[0] if len(named) == 1 else "")
    return images[0], label, tuple(map(str, classes.get(label, ())))


def _holds_bytes(kind: Any) -> bool:
    """Return True for a type of bytes, and for a struct with a field `bytes` of such a type, as `datasets` writes it."""
    if str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return str(kind) in ("binary", "large_binary")


def _starts_with_image(path: Path, column: str) -> bool:
    try:
        check_image(next(filter(None, _images(path, column, 1)), b""), "", ImagePolicy())
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
    except FAULTS as error:
        where = f"{path}: column {column}, from row {done:,} on"
        raise ValueError(f"{where}: cannot be read ({_first_line(error)}). Copy or download it again") from None


def read_labels(files: Iterable[Path], column: str, classes: tuple[str, ...]) -> tuple[list[int], tuple[str, ...], str]:
    """Return the label of each row of all files, [] without a column of labels; the classes, and a note."""
    if not column:
        return [], (), f"no labels: no column is called {', '.join(LABEL_NAMES)}"
    found, refused = list[Label](), list[str]()
    for value in (value for path in files for value in read_column(path, column, LABEL_ROWS)):
        try:
            found.append(UNLABELLED if value is None else label_of(value))
        except ValueError:
            refused.append(f"{str(value)[:40]!r} in row {len(found):,}")
            found.append(UNLABELLED)
    labels, names = number_labels(found)
    note = f", {len(refused):,} of which are not one number or one name, such as {refused[0]}" if refused else ""
    return labels, names or classes, f"labels from {column}{note}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
