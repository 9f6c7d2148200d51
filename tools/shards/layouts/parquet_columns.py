"""Which columns of parquet files hold the images and the labels, by type and usual names; and the labels as numbers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards.index import UNLABELLED
from pipeline.shards.samples import Label, label_of
from tools.shards.catalogue import check_class_names

BATCH_ROWS = 64
LABEL_ROWS = 1 << 16
IMAGE_NAMES = (
    "image",
    "img",
    "images",
    "picture",
    "photo",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
    "img_bytes",
    "bytes",
)
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_id", "cls", "target", "category", "y")
# What pyarrow raises on damaged files; its own errors are ValueErrors, OSErrors and so on as well.
PARQUET_FAULTS = (
    ArithmeticError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Columns:
    """`label` is "" where there is none; `names` are the classes that `datasets` keeps in the metadata, where it does."""

    image: str
    label: str
    names: tuple[str, ...]

    def note(self) -> str:
        return f"images from the column {self.image}, " + (
            f"labels from {self.label}" if self.label else f"no labels: no column is called {', '.join(LABEL_NAMES)}"
        )


def open_file(path: Path) -> Any:
    """Raises ValueError for a file that is not parquet, and where pyarrow is not installed."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: parquet files need pyarrow, which is not installed: pip install -e .[parquet]. If the images are in "
            "other files beside it, choose their --layout: tars, folders or flat"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except PARQUET_FAULTS as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({_first_line(error)}). Copy or download it again"
        ) from None


def find_columns(path: Path) -> Columns | None:
    """None where no column holds images, as in tables that describe images elsewhere."""
    schema = open_file(path).schema_arrow
    features = _features(schema.metadata or {})
    images = [field.name for field in schema if _holds_images(field)]
    if not images:
        return None
    image = _preferred(images, IMAGE_NAMES)
    if not image:
        raise ValueError(
            f"{path}: the columns {', '.join(images)} all hold images: keep one, or call one of them image"
        )
    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    label = next((name for name in LABEL_NAMES if name in schema.names), "") or (
        classes[0] if len(classes) == 1 else ""
    )
    names = features.get(label, {}).get("names", [])
    return Columns(image, label, tuple(str(name) for name in names) if isinstance(names, list) else ())


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, AttributeError):
        return {}


def _holds_images(field: Any) -> bool:
    types = import_module("pyarrow.types")
    if types.is_struct(field.type):
        inside = {field.type.field(k).name: field.type.field(k).type for k in range(field.type.num_fields)}
        return "bytes" in inside and (types.is_binary(inside["bytes"]) or types.is_large_binary(inside["bytes"]))
    is_bytes = types.is_binary(field.type) or types.is_large_binary(field.type)
    return is_bytes and field.name.lower() in IMAGE_NAMES


def _preferred(names: list[str], usual: tuple[str, ...]) -> str:
    return next(
        (name for known in usual for name in names if name.lower() == known), names[0] if len(names) == 1 else ""
    )


def batches(path: Path, column: str, rows: int) -> Iterator[list[Any]]:
    """The values of one column. Raises ValueError with file, column and row for damage."""
    parquet, done = open_file(path), 0
    source = parquet.iter_batches(rows, columns=[column])
    while True:
        try:
            batch = next(source, None)
            values = [] if batch is None else batch.column(0).to_pylist()
        except PARQUET_FAULTS as error:
            where = f"{path}: column {column}, from row {done:,} on"
            raise ValueError(f"{where}: cannot be read ({_first_line(error)}). Copy or download it again") from None
        if batch is None:
            return
        done += len(values)
        yield values


def image_bytes(value: Any) -> bytes:
    """What a row holds; b"" where it holds a path alone."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content or b""


def read_labels(files: list[Path], columns: Columns) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The labels of each file, `[rows] int32`, and the classes. Names as labels are numbered in their order.

    Raises ValueError with file, column and row for a value that is no label.
    """
    found = [_labels_of_file(path, columns.label) for path in files]
    texts = sorted({label for labels in found for label in labels if isinstance(label, str)})
    where = f"{files[0].parent}: column {columns.label}"
    highest = max((label for labels in found for label in labels if isinstance(label, int)), default=UNLABELLED)
    if texts and highest != UNLABELLED:
        raise ValueError(f"{where}: holds numbers ({highest}) as well as names ({texts[0]!r}): use one of them for all")
    if columns.names and highest >= len(columns.names):
        raise ValueError(
            f"{where}: label {highest}, but the metadata name {len(columns.names)} classes: damaged or changed"
        )
    classes = tuple(texts) or columns.names
    check_class_names(list(classes), where)
    numbers: dict[str | int, int] = {name: number for number, name in enumerate(texts)}
    return [np.array([int(numbers.get(label, label)) for label in labels], np.int32) for labels in found], classes


def _labels_of_file(path: Path, column: str) -> list[Label]:
    labels: list[Label] = []
    for values in batches(path, column, LABEL_ROWS):
        for value in values:
            try:
                if not isinstance(value, int | float | str | None):
                    raise ValueError(f"{type(value).__name__}")
                labels.append(UNLABELLED if value is None else label_of(value))
            except ValueError:
                raise ValueError(
                    f"{path}: column {column}, row {len(labels):,} holds {str(value)[:40]!r}, which is no label: one number or "
                    "one name for each image is needed. Fix it, or remove the column to convert without labels"
                ) from None
    return labels


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
