"""Turns pydantic's errors into messages: what was found, what is allowed, and which key was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from train.config.yaml12 import AmbiguousText, KeyPath, shown

Schema = dict[str, Any]

_KINDS = {"boolean": "true or false", "integer": "an integer", "number": "a number", "string": "text", "null": "null"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def known_keys(node: Schema, definitions: Schema, prefix: str = "") -> dict[str, Schema]:
    """Each dotted key of a JSON Schema with its own schema; list positions are left out: `model.levels.layer`."""
    node = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    found: dict[str, Schema] = {}
    for inner in (*node.get("anyOf", ()), *node.get("allOf", ()), *filter(None, [node.get("items")])):
        found |= known_keys(inner, definitions, prefix)
    for name, inner in node.get("properties", {}).items():
        found |= {prefix + name: inner} | known_keys(inner, definitions, f"{prefix}{name}.")
    return found


def is_section(schema: Schema) -> bool:
    """Whether this key holds a group of keys; older pydantic wraps the reference to it in allOf."""
    return "$ref" in schema or "allOf" in schema


def allowed(schema: Schema) -> str:
    """What a JSON Schema accepts, in words."""
    if options := schema.get("enum") or [allowed(option) for option in schema.get("anyOf", ())]:
        return _either(options)
    if items := schema.get("prefixItems"):
        return f"a list of {len(items)}, each {allowed(items[0])}"
    if "items" in schema:
        return f"a list, each {allowed(schema['items'])}"
    kind = schema.get("allowed") or schema.get("const") or _KINDS.get(schema.get("type", ""), "a mapping")
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    return f"{kind} {bounds}".rstrip()


def _either(options: Iterable[Any]) -> str:
    *head, last = map(str, options)
    return f"{', '.join(head)} or {last}" if head else last


def meant_keys(key: str, known: Iterable[str]) -> list[str]:
    """The known dotted keys that an unknown one may mean: in its section, by its name in others, or by a similar name."""
    section, _, name = key.rpartition(".")
    names = {other: other.rpartition(".")[2] for other in known}
    if name not in names.values():
        siblings = [other for other in known if other.rpartition(".")[0] == section]
        if near := get_close_matches(key, siblings, 1, 0.8):
            return near
        name = next(iter(get_close_matches(name, names.values(), 1)), "")
    return [other for other in known if names[other] == name]


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a dotted key that does not exist."""
    section, _, name = key.rpartition(".")
    if key in known:
        return f"unknown key: dots are for the command line; write {name} under {section}"
    if meant := meant_keys(key, known):
        return f"unknown key; did you mean {_either(meant)}?"
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return f"unknown key; allowed: {', '.join(siblings)}"


def is_missing(problem: Any) -> bool:
    """Whether a key is missing; pydantic says the same of too short a list."""
    return problem["type"] == "missing" and isinstance(problem["loc"][-1], str)


def explain(problem: Any, path: KeyPath, text: str, known: dict[str, Schema]) -> str:
    """The message for pydantic's `problem` with the value at `path`, which was written as `text`."""
    key = ".".join(part for part in path if isinstance(part, str))
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, known)
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    expected = allowed(known[key]) if key in known else "a plain value"
    if is_missing(problem):
        return f"missing and has no default; allowed: {expected}"
    return f"found {shown(text)}; allowed: {expected}{_hint(problem['input'], text, expected)}"


def _hint(value: Any, text: str, expected: str) -> str:
    if expected.startswith(("a name", "a path", "a folder")):
        return "" if isinstance(value, str) else f'; quote it: "{shown(text)}"'
    if isinstance(value, AmbiguousText):
        return f"; {shown(text)} is text here"
    return "; remove the quotes" if isinstance(value, str) and text[:1] in ("'", '"') else ""
