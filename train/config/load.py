"""Reads a YAML file and `section.key=value` overrides into a Config, and reports all errors at once."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from train.config.changes import flatten
from train.config.rules import DATASETS, broken_rules, merge
from train.config.schema import Config
from train.config.yaml12 import ConfigError, KeyPath, dotted, parse, printable

SHORT_FLAGS = {
    "batch_size": "data.batch_size",
    "epochs": "training.epochs",
    "data_path": "data.data_path",
    "dataset": "data.dataset",
    "resume": "checkpoint.resume",
}
MAX_BYTES = 100_000  # a shard passed by mistake is not read to its end
COMMAND_LINE = "command line"
Schema = dict[str, Any]
_KINDS = {"boolean": "true or false", "integer": "an integer", "number": "a number", "string": "text", "null": "null"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the Config of a YAML file. Raises ConfigError with all errors, one per line."""
    return load_config_with_origins(path, overrides)[0]


def load_config_with_origins(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Return the Config and the origin of each dotted key: `file:line`, `command line` or `default`. Raises ConfigError."""
    written: dict[str, str] = {}
    values = parse(_read(path), str(path), written)
    if not isinstance(values, dict):
        problem = "not a mapping" if values else "the file is empty"
        raise ConfigError(f"{written.get('', f'{path}:1')}: {problem}; expected sections such as data: and training:")
    for n, override in enumerate(overrides):
        _apply(override, overrides[:n], values, written)
    config = _validate(values, written)
    dataset_defaults = flatten(DATASETS.get(config.data.dataset, {}))
    origins = {}
    for key in flatten(config.resolved):
        default = f"default of {config.data.dataset}" if key in dataset_defaults else "default"
        origins[key] = written.get(key, default)
    return config, origins


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; configs/ holds the shipped files") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not a text file: byte {raw[error.start]:#04x} is not UTF-8") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}:1: larger than {MAX_BYTES} bytes; not a config file")
    return text


def _apply(override: str, earlier: Sequence[str], values: dict[str, Any], written: dict[str, str]) -> None:
    """Set the value of `section.key=value` in `values`, and its origin in `written`. Raises ConfigError."""
    key, equals, text = override.partition("=")
    problem = "" if equals else "expected section.key=value"
    if "$ref" in all_keys().get(key, {}):
        problem = "is a section; set its keys one by one"
    if any(f"{other.partition('=')[0]}.".startswith(f"{key}.") for other in earlier):
        problem = "given twice; remove one"
    if problem:
        raise ConfigError(printable(f"{COMMAND_LINE}: {override}: {problem}"))
    for old in [old for old in written if old == key or old.startswith((f"{key}.", f"{key}["))]:
        del written[old]
    *sections, name = path = tuple(key.split("."))
    for n, section in enumerate(sections, 1):
        if not isinstance(values.get(section), dict):
            values[section] = {}
            written[dotted(path[:n])] = COMMAND_LINE
        values = values[section]
    written[key] = COMMAND_LINE
    values[name] = parse(text, COMMAND_LINE, written, path)


def _validate(values: dict[str, Any], written: dict[str, str]) -> Config:
    """Return the Config. Raises ConfigError: the rules between keys are checked once every value is valid."""
    data = values.get("data")
    dataset = data.get("dataset") if isinstance(data, dict) else None
    try:
        config = Config.model_validate(merge(DATASETS.get(str(dataset), {}), values))
    except ValidationError as error:
        problems: dict[KeyPath, str] = {}
        for problem in error.errors(include_url=False):
            path: KeyPath = problem["loc"]
            if not _is_missing(problem):  # pydantic appends each type of a union that it tried
                path = _written_part(path, written)
            problems.setdefault(path, _explain(problem, ".".join(part for part in path if isinstance(part, str))))
    else:
        problems = {tuple(key.split(".")): message for key, message in broken_rules(config)}
        if not problems:
            return config
    order = list(written)  # as in the file, and then as on the command line
    found = sorted((order.index(dotted(_written_part(path, written))), path) for path in problems)
    lines = [f"{written[order[n]]}: {dotted(path)}: {problems[path]}" for n, path in found]
    raise ConfigError("\n".join(map(printable, lines)))


def _is_missing(problem: Any) -> bool:
    """Return True if a key is missing; pydantic uses the same word for a missing entry of a list."""
    return problem["type"] == "missing" and isinstance(problem["loc"][-1], str)


def _written_part(path: KeyPath, written: dict[str, str]) -> KeyPath:
    """Return the longest beginning of `path` that the user wrote."""
    return next(path[:n] for n in range(len(path), -1, -1) if dotted(path[:n]) in written)


def _explain(problem: Any, key: str) -> str:
    """Return the message for pydantic's `problem` with the value of `key`."""
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    schema, value = all_keys().get(key, {}), problem["input"]
    expected = allowed(schema) if schema else "a plain value"
    if _is_missing(problem):
        return f"missing and has no default; allowed: {expected}"
    if value == "":
        return f"has no value; allowed: {expected}"
    found = ("text " if isinstance(value, str) else "") + json.dumps(value, ensure_ascii=False)
    hint = "; put it in quotes" if "allowed" in schema and isinstance(value, int | float) else ""
    return f"found {found if len(found) <= 60 else found[:57] + '...'}; allowed: {expected}{hint}"


def _unknown_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    if key in all_keys():
        return f"unknown key: dots are for the command line; write {name} under {section}"
    if meant := meant_keys(key):
        return f"unknown key; did you mean {' or '.join(meant)}?"
    siblings = [other.rpartition(".")[2] for other in all_keys() if other.rpartition(".")[0] == section]
    return f"unknown key; allowed: {', '.join(siblings)}"


def meant_keys(key: str) -> list[str]:
    """Return the keys that an unknown one can mean: of the same or the most similar name, in its section or else in any."""
    section, _, name = key.rpartition(".")
    names = {other: other.rpartition(".")[2] for other in all_keys()}
    near = [name] if name in names.values() else get_close_matches(name, names.values(), 1)
    meant = [other for other in names if names[other] in near]
    return [other for other in meant if other.rpartition(".")[0] == section] or meant


@cache
def all_keys() -> dict[str, Schema]:
    """Return every dotted key with its JSON Schema; list positions are left out: `model.levels.layer`."""
    schema = Config.model_json_schema()
    return _keys_of(schema, schema["$defs"], "")


def _keys_of(node: Schema, definitions: Schema, prefix: str) -> dict[str, Schema]:
    node = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    keys: dict[str, Schema] = {}
    for inner in (*node.get("anyOf", ()), *filter(None, [node.get("items")])):
        keys |= _keys_of(inner, definitions, prefix)
    for name, inner in node.get("properties", {}).items():
        keys |= {prefix + name: inner} | _keys_of(inner, definitions, f"{prefix}{name}.")
    return keys


def allowed(schema: Schema) -> str:
    """Return in words what a JSON Schema accepts."""
    if options := schema.get("enum") or [allowed(option) for option in schema.get("anyOf", ())]:
        return f"{', '.join(options[:-1])} or {options[-1]}"
    if items := schema.get("prefixItems"):
        return f"a list of {len(items)}, each {allowed(items[0])}"
    if "items" in schema:
        return f"a list, each {allowed(schema['items'])}"
    kind = schema.get("allowed") or schema.get("const") or _KINDS.get(schema.get("type", ""), "a mapping")
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    return f"{kind} {bounds}".rstrip()
