"""Turns pydantic's complaints into lines that say where, what was found, what is allowed, and which key was meant."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

from pydantic import ValidationError

from train.config.yaml12 import COMMAND_LINE, AmbiguousText, Document, Issue, KeyPath, dotted, shown

Schema = dict[str, Any]

# Keys that loaders elsewhere have and that would change nothing here: refused like any such key, with the reason.
NEEDLESS = {"data.pin_memory": "crops are made where the model is, none are copied there: remove this line"}


def known_keys(schema: Schema) -> dict[str, Schema]:
    """Each dotted key of a JSON Schema with its own schema; list positions are left out: `model.levels.layer`."""
    found: dict[str, Schema] = {}

    def walk(node: Schema, prefix: str) -> None:
        if "$ref" in node:
            return walk(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], prefix)
        for option in (*node.get("anyOf", ()), *node.get("allOf", ())):
            walk(option, prefix)
        if isinstance(items := node.get("items"), dict):
            walk(items, prefix)
        for name, inner in node.get("properties", {}).items():
            found[f"{prefix}{name}"] = inner
            walk(inner, f"{prefix}{name}.")
        return None

    walk(schema, "")
    return found


def is_section(schema: Schema) -> bool:
    """Whether this key holds a group of keys; older pydantic wraps the reference to it in allOf."""
    return "$ref" in schema or "allOf" in schema


def allowed(schema: Schema) -> str:
    """What a JSON Schema lets through, in words."""
    if "allowed" in schema:
        return str(schema["allowed"])
    if "enum" in schema:
        return _either(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return _either([allowed(option) for option in schema["anyOf"]])
    kind = schema.get("type", "section")
    if kind == "array":
        return _allowed_list(schema)
    if kind == "object":
        return "a mapping of names to plain values"
    names = {"boolean": "true or false", "integer": "a whole number", "string": "text", "section": "a group of keys"}
    return names.get(kind, kind if kind == "null" else f"a {kind}") + _bounds(schema)


def _allowed_list(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {allowed(schema['prefixItems'][0])}"
    item = "of groups of keys" if "$ref" in schema["items"] else f"with each {allowed(schema['items'])}"
    return f"a list {item}"


def _bounds(schema: Schema) -> str:
    words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema]
    return f" {' and '.join(found)}" if found else ""


def _either(options: list[Any]) -> str:
    *head, last = [str(option) for option in options]
    return f"{', '.join(head)} or {last}" if head else last


@lru_cache(maxsize=4096)
def distance(a: str, b: str) -> int:
    """Edits that turn `a` into `b`: insert, delete, replace, swap neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
        before = last
    return row[-1]


def nearest(key: str, known: dict[str, Schema]) -> str | None:
    """The known dotted key that an unknown one most likely means, None if nothing is near."""
    section, _, name = key.rpartition(".")
    best, least = None, max(1.5, len(name) / 3)
    for candidate in known:
        in_section, _, named = candidate.rpartition(".")
        # A slip within the section is likelier than a key in the wrong section, unless the name is exact there.
        elsewhere = min(1.5, distance(section, in_section)) if section != in_section else 0
        if abs(len(name) - len(named)) + elsewhere <= least:  # no distance is less than that
            score = distance(name, named) + elsewhere
            if score < least or (score == least and best is None):
                best, least = candidate, score
    return best


def unknown_key(path: KeyPath, known: dict[str, Schema]) -> str:
    """The message for a key that is not there."""
    key = ".".join(str(part) for part in path if isinstance(part, str))
    section, _, name = key.rpartition(".")
    if key in NEEDLESS:
        return f"not needed: {NEEDLESS[key]}"
    if key in known:
        return f"unknown key: dots are for the command line; write {name} under {section}"
    meant = nearest(key, known)
    homes = sorted(k for k in known if k.rpartition(".")[2] == name and k != meant)
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    message = f"unknown key; did you mean {meant}?" if meant else f"unknown key; known here: {', '.join(siblings)}"
    return f"{message} ({shown(name)} is also at {_either(homes)})" if homes else message


def explain(error: ValidationError, known: dict[str, Schema], document: Document) -> Iterator[tuple[KeyPath, Issue]]:
    """One issue for each wrong key; pydantic may report several for one value, once for each type it tried."""
    done: set[KeyPath] = set()
    for problem in error.errors(include_url=False):
        loc: KeyPath = problem["loc"]
        path = loc if _is_missing(problem) else _written_part(loc, document)
        refused = any(path[:n] in document.refused for n in range(len(path) + 1))
        if problem["type"] != "rule" and path not in done and not refused:
            done.add(path)
            yield path, _issue(path, _message(problem, path, known, document), document)


def broken_rules(error: ValidationError, unsound: set[KeyPath], document: Document) -> Iterator[Issue]:
    """The broken rules in `error`, less those about unsound keys."""
    for problem in error.errors(include_url=False):
        if problem["type"] == "rule":
            involved = map(tuple, problem["ctx"]["keys"])
            if not any(a[: len(b)] == b[: len(a)] for a, b in product(involved, unsound)):
                yield _issue(problem["loc"], problem["msg"], document)


def _issue(path: KeyPath, message: str, document: Document) -> Issue:
    mark = document.marks[_written_part(path, document)]
    on_command_line = mark.place == COMMAND_LINE and path in document.marks
    return Issue(mark.place, f"{dotted(path)}={shown(mark.text)}" if on_command_line else dotted(path), message)


def _is_missing(problem: Any) -> bool:
    """Whether a key is missing; too short a list is an error of the list."""
    return problem["type"] == "missing" and isinstance(problem["loc"][-1], str)


def _written_part(loc: KeyPath, document: Document) -> KeyPath:
    """`loc` as far as the file goes; behind that, pydantic names the types it tried."""
    return next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in document.marks)


def _message(problem: Any, path: KeyPath, known: dict[str, Schema], document: Document) -> str:
    key = ".".join(part for part in path if isinstance(part, str))
    expected = allowed(known[key]) if key in known else "a plain value"
    kind = problem["type"]
    if kind == "extra_forbidden":
        return unknown_key(path, known)
    if _is_missing(problem):
        return f"missing, and it has no default; give {expected}"
    if kind == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    found = document.marks[path].text
    return f"found {shown(found)}; allowed: {expected}{_hint(problem['input'], found, expected)}"


def _hint(value: Any, written: str, expected: str) -> str:
    wants_text = expected.startswith(("a name", "a path", "a folder"))
    if isinstance(value, AmbiguousText) and expected == "true or false":
        return f" ({value} is text here)"
    if isinstance(value, AmbiguousText) and not wants_text:
        return " (write plain decimal digits)"
    if isinstance(value, str) and written[:1] in ("'", '"') and not wants_text:
        return " (the quotes make it text)"
    if isinstance(value, int | float) and wants_text:
        return f' (put it in quotes: "{written}")'
    return ""
