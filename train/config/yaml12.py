"""Settings as YAML 1.2 text, on top of PyYAML, and by dotted key.

PyYAML follows YAML 1.1: it reads 1e-4 as text, 010 as 8, 1:30 as 90 and `on` as true, and keeps the last of two equal keys.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from pipeline.text import printable

KeyPath = tuple[str | int, ...]
_CONSTANTS = {"true": True, "false": False, "null": None, "~": None}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})\Z")  # 18 digits always fit 64 bits
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z")


class ConfigError(ValueError):
    """Everything that is wrong with a config, one error per line."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            problem = "anchors (&), aliases (*) and tags (!) are not supported; write the value out, or quote text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def parse(text: str, name: str, origins: dict[str, str], path: KeyPath = ()) -> Any:
    """Return the plain value of `text`, "" if it is empty, and put the origin of each dotted key into `origins`.

    In a file, where `path` is (), that is `name:line`; in an override of the key at `path` it is `name`. Raises ConfigError.
    """

    def origin(line: int) -> str:
        return name if path else f"{name}:{line + 1}"

    try:
        node = _Loader(text).get_single_node()
        return "" if node is None else _build(node, path, origin, origins)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # escapes such as "\UFFFFFFFF"
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = ", ".join(filter(None, (getattr(error, part, None) for part in ("context", "problem")))) or str(error)
        hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        key = f"{dotted(path)}: " if path else ""
        raise ConfigError(one_line(f"{origin(line)}: {key}invalid YAML: {problem}{hint}")) from error


def _build(node: yaml.Node, path: KeyPath, origin: Callable[[int], str], origins: dict[str, str]) -> Any:
    origins.setdefault(dotted(path), origin(node.start_mark.line))
    if isinstance(node, yaml.ScalarNode):
        return _plain_value(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), origin, origins) for i, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        mark, key = key_node.start_mark, (*path, key_node.value)
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=mark)
        if key_node.value in values:
            problem = f"duplicate key {dotted(key)}, first at {origins[dotted(key)]}; remove one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        origins[dotted(key)] = origin(mark.line)
        values[key_node.value] = _build(value_node, key, origin, origins)
    return values


def _plain_value(text: str) -> bool | int | float | str | None:
    """Return the value of a scalar without quotes: a constant, a decimal number, or else text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    return int(text) if _INT.match(text) else float(text) if _FLOAT.match(text) else text


def dotted(path: KeyPath) -> str:
    """Return `model.levels[0].layer` for `("model", "levels", 0, "layer")`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key; an empty section counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], free: Sequence[str] = ()) -> list[str]:
    """Return `key: old -> new` for each key of two `Config.resolved` that differs and does not start with one of `free`."""
    old, new = flatten(before), flatten(after)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(tuple(free))
    ]


def one_line(text: str) -> str:
    return printable(" ".join(text.split()))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 takes for another type, so that every reader gets the same values."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'  # with line breaks escaped, a value stays on one line
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


def to_text(values: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "") -> str:
    """Return YAML that reads back equal: one line per key, with its origin, if there is one, in a comment."""
    text, indent = "", "  " * prefix.count(".")
    for key, value in values.items():
        if isinstance(value, dict) and value:
            text += f"{indent}{key}:\n{to_text(value, origins, f'{prefix}{key}.')}"
            continue
        pair = yaml.dump({key: value}, None, _Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
        line, origin = indent + pair[1:-2], origins.get(prefix + key)  # without the braces and the line break
        text += f"{line:<44}  # {origin}\n" if origin else f"{line}\n"
    return text
