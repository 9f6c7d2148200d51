"""Reads a YAML file and `section.key=value` overrides into a Config, and reports all errors at once."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from train.config.datasets import DATASETS, merge, with_dataset_defaults
from train.config.errors import explain, is_missing, is_section, known_keys, meant_keys
from train.config.schema import Config
from train.config.yaml12 import COMMAND_LINE, ConfigError, Document, KeyPath, Mark, compose, dotted, shown

SHORT_FLAGS = {
    "batch_size": "data.batch_size",
    "epochs": "training.epochs",
    "data_path": "data.data_path",
    "dataset": "data.dataset",
    "resume": "checkpoint.resume",
}
MAX_BYTES = 100_000  # a shard given by mistake is not read to its end
# Stand-ins for the keys without a default, used while checking the rules beside other errors; no rule is about them.
_REQUIRED = {"data": {"data_path": "unknown"}, "logging": {"run_name": "unknown"}}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The Config of a YAML file. Raises ConfigError: all errors, one on each line."""
    return load_config_with_origins(path, overrides)[0]


def load_config_with_origins(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """The Config, and for each dotted key `default`, `file:line` or `command line`. Raises ConfigError."""
    document = _read_file(path)
    for override in overrides:
        if problem := _apply(override, document):
            document.issues.append((COMMAND_LINE, f"command line: {shown(override)}: {problem}"))
    config = _validate(document)
    if document.issues:
        raise ConfigError("\n".join(text for _, text in sorted(document.issues, key=lambda issue: issue[0])))
    own_defaults = set(_leaves(DATASETS.get(config.data.dataset, {})))
    origins = {}
    for key in _leaves(config.resolved):
        default = f"default of {config.data.dataset}" if key in own_defaults else "default"
        origins[dotted(key)] = document.place(document.marks[key]) if key in document.marks else default
    return config, origins


def annotated(config: Config, origins: dict[str, str]) -> str:
    """`config.to_yaml()` with a comment behind each value that says where it comes from; it reads back equal."""
    text = config.to_yaml()
    lines = text.splitlines()
    for path, mark in _document(text, "").marks.items():
        if (key := dotted(path)) in origins:
            lines[mark.line - 1] = f"{lines[mark.line - 1]:<44}  # {origins[key]}"
    return "\n".join(lines)


@cache
def all_keys() -> dict[str, Any]:
    """Every dotted key, with its JSON Schema."""
    schema = Config.model_json_schema()
    return known_keys(schema, schema["$defs"])


def _read_file(path: Path) -> Document:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; configs/ holds the shipped ones") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not a text file: byte {raw[error.start]:#04x} is not UTF-8") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}:1: larger than {MAX_BYTES} bytes; not a config file")
    return _document(text, str(path))


def _document(text: str, name: str) -> Document:
    try:
        node = compose(text)
    except ConfigError as error:
        raise ConfigError(f"{name}:{error}") from error
    if not isinstance(node, yaml.MappingNode):
        found = "the file is empty" if node is None else "not a mapping"
        line = node.start_mark.line + 1 if node else 1
        raise ConfigError(f"{name}:{line}: {found}; expected sections such as data: and training:")
    document = Document(name)
    document.values = document.build(node, ())
    return document


def _apply(override: str, document: Document) -> str:
    """Sets the value of `section.key=value`; returns what is wrong with the override, if anything."""
    key, equals, text = override.partition("=")
    path: KeyPath = tuple(key.split("."))
    if not equals:
        return "expected section.key=value"
    if is_section(all_keys().get(key, {})):
        return "is a section; set its keys one by one"
    if any(old[: len(path)] == path and mark.override for old, mark in document.marks.items()):
        return "given twice; remove one"
    try:
        node = compose(text)
    except ConfigError as error:
        return str(error).partition(": ")[2]
    if node is None:
        return "has no value"
    home: Any = document.values
    for n, part in enumerate(path[:-1], 1):
        home = home.setdefault(part, {})
        if not isinstance(home, dict):
            return f"{dotted(path[:n])} is not a section"
        document.marks.setdefault(path[:n], Mark(COMMAND_LINE, override, override))
    document.marks = {old: mark for old, mark in document.marks.items() if old[: len(path)] != path}
    home[path[-1]] = document.build(node, path, override)
    return ""


def _validate(document: Document) -> Config:
    """The Config. With `document.issues`, one that has defaults in place of the invalid values."""
    unsound, meant = set(document.refused), set[KeyPath]()
    values = document.values
    try:
        config = Config.model_validate(with_dataset_defaults(values))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            path: KeyPath = problem["loc"] if is_missing(problem) else document.written_part(problem["loc"])
            if any(path[:n] in unsound for n in range(len(path) + 1)):
                continue  # pydantic reports a value once for each type it tried
            unsound.add(path)
            text = document.marks[document.written_part(path)].text
            document.add_issue(path, explain(problem, path, text, all_keys()))
            if problem["type"] == "extra_forbidden":
                meant |= {tuple(key.split(".")) for key in meant_keys(".".join(map(str, path)), all_keys())}
        invalid = {tuple(takewhile(_is_name, path)) for path in unsound}
        config = Config.model_validate(with_dataset_defaults(merge(_REQUIRED, _without(invalid, values))))
    for keys, message in config.broken_rules():
        paths: list[KeyPath] = [tuple(key.split(".")) for key in keys]
        if not any(a[: len(b)] == b[: len(a)] for a, b in product(paths, unsound | meant)):
            document.add_issue(paths[0], message)
    return config


def _is_name(part: str | int) -> bool:
    return isinstance(part, str)


def _without(paths: set[KeyPath], values: Any, home: KeyPath = ()) -> Any:
    """A copy of `values` without the keys at `paths`."""
    if not isinstance(values, dict):
        return values
    kept = {key: item for key, item in values.items() if (*home, key) not in paths}
    return {key: _without(paths, item, (*home, key)) for key, item in kept.items()}


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value that is not itself a section."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    else:
        yield path
