"""JSON files next to shards, which are input from outside: the manifest with class names and checksums, and others."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, InstanceOf, StrictInt, ValidationError

from pipeline.files import read_whole

MANIFEST_NAME = "manifest.json"
MAX_JSON_BYTES = 1 << 26  # of a file with JSON, many times what a million shards need
MAX_LOG_BYTES = 1 << 30  # of a file of JSON lines: a million and more
Text = InstanceOf[str]  # pydantic's own text refuses names of files that are not UTF-8
Model = TypeVar("Model", bound=BaseModel)


class ManifestShard(BaseModel):
    """A tar of `bytes` bytes, None where the file does not say."""

    name: Text
    sha256: Text
    bytes: StrictInt | None = None


class Manifest(BaseModel):
    """`classes[label]` names a class; empty without names. `num_samples`: None where the file does not say."""

    model_config = ConfigDict(frozen=True)

    name: Text = ""
    classes: tuple[Text, ...] = ()
    shards: tuple[ManifestShard, ...] = ()
    num_samples: StrictInt | None = None


def read_object(place: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ValueError that names it, what it holds instead, and the remedy."""
    text = read_whole(place, MAX_JSON_BYTES)
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise ValueError(f"{place}: damaged, no JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place}: damaged: holds {_short_json(content)}, not a JSON object. {remedy}")
    return content


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object in each line; an empty one for a line that holds something else."""
    for line in read_whole(path, MAX_LOG_BYTES).decode(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except (RecursionError, ValueError):  # cut off by a crash, for example
            content = {}
        yield content if isinstance(content, dict) else {}


def as_model(model: type[Model], content: dict[str, Any], place: Path, remedy: str) -> Model:
    """Return the JSON object from a file as a model. Raises ValueError as `read_object`, for the first wrong field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))} is {_short_json(first['input'])} ({first['msg']})"
        raise ValueError(f"{place}: damaged: {reason}. {remedy}") from None


def read_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest, None without one or for another program's file. Raises ValueError for a damaged one."""
    place = folder / MANIFEST_NAME
    remedy = f"Convert {folder} again, or remove the file to use the shards without class names and checksums"
    try:
        content = read_object(place, remedy)
    except FileNotFoundError:
        return None
    return as_model(Manifest, content, place, remedy) if {"format_version", "classes"} & content.keys() else None


@contextmanager
def read_as_expected(place: Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with the content of a JSON file from outside, inside this context, into a ValueError of one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{place}: damaged, not as this program writes it ({reason}). {remedy}") from None


def check_fits(folder: Path, manifest: Manifest | None, sizes: dict[str, int], num_samples: int) -> None:
    """Raise ValueError if a manifest is not of these tars. `sizes`: bytes by name; `num_samples`: of all tars."""
    if manifest is None or not manifest.shards:
        return
    listed = {shard.name: shard.bytes for shard in manifest.shards}
    reasons = [
        *(f"{name} is not of its conversion" for name in sizes if name not in listed),
        *(f"{name} is missing" for name in listed if name not in sizes),
        *(f"{name} has {sizes[name]:,} bytes instead of {n:,}" for name, n in listed.items() if n and sizes.get(name, n) != n),
    ]
    if manifest.num_samples not in (None, num_samples):
        reasons.append(f"{num_samples:,} images instead of {manifest.num_samples:,}")
    if reasons:
        raise ValueError(
            f"{folder / MANIFEST_NAME}: of other tars than these: {reasons[0]}. Labels of two conversions can mean "
            f"different classes: keep each in a folder of its own, or copy or convert {folder} again"
        )


def check_class_count(folder: Path, labels: np.ndarray, manifest: Manifest) -> None:
    """Raise ValueError if samples have labels for which the manifest of `folder` has no class. `labels`: of all samples."""
    if 0 < (known := len(manifest.classes)) <= (highest := int(labels.max())):
        raise ValueError(
            f"{folder / MANIFEST_NAME}: names {known} classes, but labels go up to {highest}. Convert "
            f"{folder} again, or remove the file to use the labels without names"
        )


def _short_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
