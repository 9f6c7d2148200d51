"""JSON files next to shards, which are input from outside: the manifest with class names and checksums, and others."""

import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, InstanceOf, StrictInt, ValidationError

from pipeline.shards.storage import join, read_bytes

MANIFEST_NAME = "manifest.json"
Text = InstanceOf[str]  # pydantic's own text refuses names of files that are not UTF-8
Model = TypeVar("Model", bound=BaseModel)


class ManifestShard(BaseModel):
    """A tar of `bytes` bytes, None where the file does not say."""

    name: Text
    sha256: Text
    bytes: StrictInt | None = None


class Manifest(BaseModel):
    """`classes[label]` names a class and `class_names[label]` says it in words; both are empty without names.

    `num_samples`: None where the file does not say.
    """

    model_config = ConfigDict(frozen=True)

    name: Text = ""
    classes: tuple[Text, ...] = ()
    class_names: tuple[Text, ...] = ()
    shards: tuple[ManifestShard, ...] = ()
    num_samples: StrictInt | None = None

    @property
    def checksums(self) -> dict[str, str]:
        """The sha256 of each tar, by its name."""
        return {shard.name: shard.sha256 for shard in self.shards}


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ValueError that names the file, what it holds instead, and the remedy."""
    return parse_object(path.read_bytes(), str(path), remedy)


def parse_object(text: bytes, place: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in the content of `place`. Raises as `read_object`."""
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise ValueError(f"{place}: damaged, no JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place}: damaged: holds {_short_json(content)}, not a JSON object. {remedy}")
    return content


def parse_model(model: type[Model], text: bytes, place: str, remedy: str) -> Model:
    """Return the JSON object in the content of `place` as a model. Raises ValueError with its first wrong field."""
    try:
        return model.model_validate(parse_object(text, place, remedy))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))} is {_short_json(first['input'])} ({first['msg']})"
        raise ValueError(f"{place}: damaged: {reason}. {remedy}") from None


def read_manifest(folder: Path | str) -> Manifest | None:
    """Return the manifest of a folder or prefix, None if there is none or another program wrote a file of that name.

    Raises ValueError for a damaged one, StoreError for a store that does not answer.
    """
    place = join(folder, MANIFEST_NAME)
    try:
        text = read_bytes(place)
    except FileNotFoundError:
        return None
    remedy = f"Convert {folder} again, or remove the file to use the shards without class names and checksums"
    if not {"format_version", "classes"} & parse_object(text, place, remedy).keys():
        return None
    return parse_model(Manifest, text, place, remedy)


def check_class_count(folder: Path | str, labels: np.ndarray, manifest: Manifest) -> None:
    """Raise ValueError if samples have labels for which the manifest of `folder` has no class. `labels`: of all samples."""
    highest, classes = int(labels.max()), manifest.classes
    if classes and highest >= len(classes):
        raise ValueError(
            f"{join(folder, MANIFEST_NAME)}: names {len(classes)} classes, but labels go up to {highest}. Convert "
            f"{folder} again, or remove the file to use the labels without names"
        )


def _short_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
