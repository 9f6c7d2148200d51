"""Reads a YAML file and `section.key=value` overrides into a Config, and reports everything that is wrong at once."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from train.config.datasets import is_dataset_default, with_dataset_defaults
from train.config.errors import broken_rules, explain, is_section, known_keys, nearest, unknown_key
from train.config.schema import Config
from train.config.yaml12 import COMMAND_LINE, ConfigError, Document, Issue, KeyPath, build, compose, dotted, shown

SHORT_FLAGS = {
    "batch_size": "data.batch_size",
    "epochs": "training.epochs",
    "data_path": "data.data_path",
    "dataset": "data.dataset",
    "resume": "checkpoint.resume",
}
MAX_BYTES = 100_000  # a shard given by mistake is not read to its end


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The Config of a YAML file. Raises ConfigError: all errors, one on each line."""
    return load_config_with_origins(path, overrides)[0]


def load_config_with_origins(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """The Config, and for each dotted key `default`, `file:line` or `command line`. Raises ConfigError."""
    document = _read_document(path)
    for override in overrides:
        _apply(override, document, known_keys(_schema()))
    config = _validate(document)
    if config is None or document.issues:
        raise ConfigError("\n".join(str(issue) for issue in sorted(document.issues, key=_reading_order)))
    return config, {dotted(key): _origin(key, document, config.data.dataset) for key in _leaves(config, ())}


def annotated(config: Config, origins: dict[str, str]) -> str:
    """`config.to_yaml()` with a comment behind each value that says where it comes from; it reads back equal."""
    lines = config.to_yaml().splitlines()
    document = _document(compose("\n".join(lines), ""), "")
    for path, mark in document.marks.items():
        if (key := dotted(path)) in origins:
            row = int(mark.place.rpartition(":")[2]) - 1
            lines[row] = f"{lines[row]:<44}  # {origins[key]}"
    return "\n".join(lines)


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _validate(document: Document) -> Config | None:
    """The Config, or None and `document.issues` complete."""
    known = known_keys(_schema())
    try:
        return Config.model_validate(with_dataset_defaults(document.values))
    except ValidationError as error:
        found = dict(explain(error, known, document))
    document.issues.extend(found.values())
    meant = (nearest(".".join(map(str, path)), known) for path in found)
    unsound = document.refused | set(found) | {tuple(key.split(".")) for key in meant if key}
    try:  # rules are asked only when all keys are sound, so ask again without the unsound ones
        Config.model_validate(_without(unsound, with_dataset_defaults(document.values)))
    except ValidationError as error:
        document.issues.extend(broken_rules(error, unsound, document))
    return None


def _without(unsound: set[KeyPath], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` with the unsound keys left to their defaults."""
    kept = deepcopy(values)
    for path in unsound:
        *sections, name = takewhile(lambda part: isinstance(part, str), path)
        home: Any = kept
        for section in sections:
            home = home.get(section) if isinstance(home, dict) else None
        if isinstance(home, dict):
            home.pop(name, None)
    # Stand-ins where there is no default; no rule is about these keys.
    kept.setdefault("data", {}).setdefault("data_path", "unknown")
    kept.setdefault("logging", {}).setdefault("run_name", "unknown")
    return kept


def _read_document(path: Path) -> Document:
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file; the shipped ones are in configs/") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be opened: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not a text file: byte {raw[error.start]:#04x} is not UTF-8") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name}:1: over {MAX_BYTES} bytes; that is no config file")
    return _document(compose(text, name), name)


def _document(node: yaml.Node | None, name: str) -> Document:
    if node is None:
        raise ConfigError(f"{name}:1: the file is empty; expected sections such as data: and training:")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{name}:{node.start_mark.line + 1}: expected sections such as data: and training:, not a "
            f"{'list' if isinstance(node, yaml.SequenceNode) else 'single value'}"
        )
    document = Document()
    document.values = build(node, (), name, document)
    return document


def _apply(override: str, document: Document, known: dict[str, Any]) -> None:
    """Writes `section.key=value` over the file's value."""
    key, equals, text = override.partition("=")
    path: KeyPath = tuple(key.split("."))

    def refuse(message: str) -> None:
        document.issues.append(Issue(COMMAND_LINE, shown(override), message))

    if not equals or not key:
        return refuse("expected section.key=value")
    if problem := _target_problem(path, document, known):
        return refuse(problem)
    try:
        node = compose(text, COMMAND_LINE)
    except ConfigError as error:
        return refuse(str(error).partition(": ")[2])
    if node is None:
        return refuse("nothing is written after =")
    _forget(path, document)
    home: Any = document.values
    for part in path[:-1]:
        home = home.setdefault(part, {})
        if not isinstance(home, dict):
            return None  # the file has no section here, and is told so
    home[path[-1]] = build(node, path, COMMAND_LINE, document)
    return None


def _target_problem(path: KeyPath, document: Document, known: dict[str, Any]) -> str:
    """Why an override cannot set the key at `path`; empty if it can."""
    key, home = ".".join(map(str, path)), ".".join(map(str, path[:-1]))
    is_entry = known.get(home, {}).get("type") == "object"
    if key not in known and not is_entry:
        return unknown_key(path, known)
    if is_section(known.get(key, {})):
        return "is a group of keys; set them one by one"
    if home and not is_entry and not is_section(known[home]):
        return f"is inside a list; give the whole of {home}"
    if any(old[: len(path)] == path and mark.place == COMMAND_LINE for old, mark in document.marks.items()):
        return "given twice; remove one"
    return ""


def _forget(path: KeyPath, document: Document) -> None:
    for old in [mark for mark in document.marks if mark[: len(path)] == path]:
        del document.marks[old]


def _leaves(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Every key of a Config that holds a value of its own."""
    inner = {name: getattr(value, name) for name in type(value).model_fields} if isinstance(value, BaseModel) else value
    if isinstance(inner, dict) and inner:
        for name, item in inner.items():
            yield from _leaves(item, (*path, name))
    else:
        yield path


def _origin(path: KeyPath, document: Document, dataset: str) -> str:
    if mark := document.marks.get(path):
        return mark.place
    return f"default of {dataset}" if is_dataset_default(dataset, path) else "default"


def _reading_order(issue: Issue) -> tuple[bool, int]:
    line = issue.place.rpartition(":")[2]
    return (issue.place.startswith(COMMAND_LINE), int(line) if line.isdigit() else 0)
