"""`manifest.json` beside converted shards: class names and checksums, checked as any other input from outside."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards import object_store
from pipeline.shards.index_file import MANIFEST_NAME
from pipeline.shards.storage import join

NOT_OBJECTS = (RecursionError, ValueError)  # UnicodeDecodeError and JSONDecodeError are among them


@dataclass(frozen=True)
class Manifest:
    """`classes[label]` names a class; without names it is empty. `class_names`: the same in words, or empty.

    `checksums`: the sha256 of each tar, by its name; `sizes`: its bytes. `num_samples`: None where the file does not say.
    """

    name: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    checksums: dict[str, str]
    sizes: dict[str, int]
    num_samples: int | None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. ValueError for any other content names the file, what it holds, and the remedy."""
    return parsed_object(path.read_bytes(), str(path), remedy)


def parsed_object(text: bytes, place: str, remedy: str) -> dict[str, Any]:
    """The JSON object in the content of `place`. Raises as `read_object`."""
    try:
        content = json.loads(text)
    except NOT_OBJECTS as error:
        raise ValueError(f"{place}: damaged, no JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place}: damaged: holds {shown(content)}, not a JSON object. {remedy}")
    return content


def read_manifest(folder: Path | str) -> Manifest | None:
    """The manifest in a folder or under a prefix. None without one, and for a file of that name that another program wrote.

    Raises ValueError for a damaged one, StoreError for a store that does not answer.
    """
    path = join(folder, MANIFEST_NAME)
    try:
        text = object_store.read(path) if object_store.is_remote(folder) else Path(path).read_bytes()
    except FileNotFoundError:
        return None
    remedy = f"Convert {folder} again, or remove the file to use the shards without class names and checksums"
    content = parsed_object(text, path, remedy)
    if not {"format_version", "classes"} & content.keys():
        return None

    def field(name: str, default: Any, is_right: Callable[[Any], bool], allowed: str) -> Any:
        value = content.get(name, default)
        if not is_right(value):
            raise ValueError(f"{path}: damaged: {name} is {shown(value)}, expected {allowed}. {remedy}")
        return value

    shards = field("shards", [], _are_shards, "a list of {name, sha256, bytes}")
    return Manifest(
        name=field("name", "", lambda value: isinstance(value, str), "a text"),
        classes=tuple(field("classes", [], _are_names, "a list of names")),
        class_names=tuple(field("class_names", [], _are_names, "a list of names")),
        checksums={shard["name"]: shard["sha256"] for shard in shards},
        sizes={shard["name"]: shard["bytes"] for shard in shards if "bytes" in shard},
        num_samples=field("num_samples", None, lambda value: value is None or type(value) is int, "a whole number"),
    )


def check_class_count(folder: Path | str, labels: np.ndarray, manifest: Manifest) -> None:
    """Raise ValueError when samples have labels for which the manifest of `folder` has no class. `labels`: of all samples."""
    highest, classes = int(labels.max()), manifest.classes
    if classes and highest >= len(classes):
        raise ValueError(
            f"{join(folder, MANIFEST_NAME)}: names {len(classes)} classes, but labels go up to {highest}. Convert "
            f"{folder} again, or remove the file to use the labels without names"
        )


def shown(value: Any) -> str:
    """A JSON value for an error line, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_shards(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("bytes", 0)) is int
        for entry in value
    )
