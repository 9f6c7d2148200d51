"""Reads a YAML file and `section.key=value` overrides into a Config, and reports all errors at once."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.text import truncate_list
from train.config.rules import broken_rules
from train.config.schema import Config, Section
from train.config.yaml12 import ConfigError, KeyPath, dotted, flatten, one_line, parse

SHORTENED = ("data.batch_size", "training.epochs", "data.data_path", "data.dataset", "checkpoint.resume")
SHORT_FLAGS = {key.rpartition(".")[2]: key for key in SHORTENED}
MAX_SHOWN = 60  # characters of a wrong value in a message
COMMAND_LINE = "command line"

log = logging.getLogger(__name__)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the Config of a YAML file. Raises ConfigError with all errors, one per line."""
    return load_config_with_origins(path, overrides)[0]


def load_config_with_origins(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Return the Config and the origin of each dotted key: `file:line`, `command line` or `default`. Raises ConfigError."""
    origins: dict[str, str] = {}
    values = read_values(path, origins)
    for override in overrides:
        _apply(override, values, origins)
    config = _validate(values, origins)
    return config, {key: origins.get(key, "default") for key in flatten(config.resolved)}


def read_values(path: Path, origins: dict[str, str]) -> dict[str, Any]:
    """Return the settings in a YAML file as they are written, and put their origins into `origins`. Raises ConfigError.

    Those of a run's folder come without the keys that only an older version had.
    """
    values = parse(_read(path), str(path), origins)
    if not isinstance(values, dict):
        problem = "not a mapping" if values else "the file is empty"
        raise ConfigError(f"{origins.get('', f'{path}:1')}: {problem}; expected sections such as data: and training:")
    of_a_run = path.name == "config.yaml" and any(path.with_name(name).exists() for name in ("checkpoints", "environment.json"))
    if of_a_run and (gone := _drop_old_keys(values)):
        _warn_once(one_line(f"{path}: left out, as this version has no such settings: {truncate_list(gone, 20)}"))
    return values


def _drop_old_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Leave out the keys that an older version wrote and this one does not have. Returns them."""
    gone = []
    for name, value in list(values.items()):
        key = prefix + name
        if key == "logging.wandb" and isinstance(value, dict):  # it was a section
            values[name] = value.get("enabled", False)
        elif key not in all_keys():
            del values[name]
            gone.append(key)
        elif _is_section(all_keys()[key]) and isinstance(value, dict):
            gone += _drop_old_keys(value, f"{key}.")
    return gone


@cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; configs/ holds the shipped files") from error
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ConfigError(f"{path}:{line}: not a text file: byte {byte:#04x} is not UTF-8") from None


def _apply(override: str, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Set the value of `section.key=value` in `values`, and its origin in `origins`. Raises ConfigError."""
    key, equals, text = override.partition("=")
    replaced = [old for old in origins if old == key or old.startswith((f"{key}.", f"{key}["))]
    problem = "" if equals else "expected section.key=value"
    if key.startswith(("+", "-")):
        problem = f"write {override.lstrip('+-')}"
    if _is_section(all_keys().get(key)):
        problem = "is a section; set its keys one by one"
    if any(origins[old] == COMMAND_LINE for old in replaced):
        problem = "given twice; remove one"
    if problem:
        raise ConfigError(one_line(f"{COMMAND_LINE}: {override}: {problem}"))
    for old in replaced:
        del origins[old]
    *sections, name = path = tuple(key.split("."))
    for n, section in enumerate(sections, 1):
        if not isinstance(values.get(section), dict):
            values[section] = {}
            origins[dotted(path[:n])] = COMMAND_LINE
        values = values[section]
    origins[key] = COMMAND_LINE
    values[name] = parse(text, COMMAND_LINE, origins, path)


def _validate(values: dict[str, Any], origins: dict[str, str]) -> Config:
    """Return the Config. Raises ConfigError: the rules between keys are checked once every value is valid."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = _explain_all(error, origins)
    else:
        problems = [(tuple(key.split(".")), message) for key, message in broken_rules(config)]
        if not problems:
            return config
    order = list(origins)  # as in the file, and then as on the command line
    lines = [(order.index(dotted(_written_part(path, origins))), dotted(path), text) for path, text in problems]
    raise ConfigError("\n".join(one_line(f"{origins[order[n]]}: {key}: {text}") for n, key, text in sorted(lines)))


def _written_part(path: KeyPath, origins: dict[str, str]) -> KeyPath:
    """Return the longest beginning of `path` that the user wrote."""
    return next(path[:n] for n in range(len(path), -1, -1) if dotted(path[:n]) in origins)


def _explain_all(error: ValidationError, origins: dict[str, str]) -> list[tuple[KeyPath, str]]:
    """Return each wrong key with a message. Where a key has several types, pydantic reports each of them."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        is_missing_key = problem["type"] == "missing" and isinstance(problem["loc"][-1], str)
        path = problem["loc"] if is_missing_key else _written_part(problem["loc"], origins)
        by_path.setdefault(path, []).append(problem)
    return [(path, _explain(path, problems)) for path, problems in by_path.items()]


def _explain(path: KeyPath, problems: list[ErrorDetails]) -> str:
    kind, value = problems[0]["type"], problems[0]["input"]
    if kind == "extra_forbidden":
        return _unknown_key(".".join(part for part in path if isinstance(part, str)))
    if refusals := [problem["ctx"]["error"] for problem in problems if problem["type"] == "value_error"]:
        return str(refusals[0])
    if kind == "missing":
        return "missing and has no default" if path == problems[0]["loc"] else "the list has too few entries"
    expected = " or ".join(dict.fromkeys(re.sub(r"^\w+ should ", "", problem["msg"]) for problem in problems))
    expected = re.sub(r"a valid dictionary.*", "a mapping", expected)
    found = "no value" if value == "" else json.dumps(value, ensure_ascii=False)
    found = found if len(found) <= MAX_SHOWN else f"{found[: MAX_SHOWN - 3]}..."
    hint = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"found {found}; it should {expected}{hint}"


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
def all_keys() -> dict[str, Any]:
    """Return every dotted key with its type; list positions are left out: `model.levels.layer`."""
    return dict(_keys_of(Config, ""))


def _keys_of(annotation: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if _is_section(annotation):
        for name, field in annotation.model_fields.items():
            yield prefix + name, field.annotation
            yield from _keys_of(field.annotation, f"{prefix}{name}.")
    for argument in get_args(annotation):
        yield from _keys_of(argument, prefix)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
