"""A strict dialect of YAML: a plain scalar is what it looks like, or it is text.

PyYAML alone reads 1e-4 as text, 010 as 8, 1:30 as 90, `on` as true, and keeps the last of two equal keys.
Here numbers are decimal, booleans are true and false, null is null or ~, all else is text, and a key comes once.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")  # 18 digits always fit 64 bits
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?")
_WORDS = {"null": None, "~": None, "true": True, "false": False}
_YES_OR_NO = {"on", "off", "yes", "no", "y", "n", "true", "false"}
_LIKE_A_NUMBER = re.compile(r"[-+]?\.?([0-9][0-9_:.]*|0[xob][0-9a-f_]+|inf|nan)(e[-+]?[0-9]+)?", re.IGNORECASE)
MAX_DEPTH = 20
COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """Everything that is wrong with a config: one line for each error."""


class AmbiguousText(str):
    """Plain text that another YAML reader would take for a number or a boolean, such as 010, 1:30 or `on`."""


@dataclass(frozen=True)
class Issue:
    """One error: where (`file:line` or `command line`), at which key, and what about it."""

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.message) if part)


@dataclass(frozen=True)
class Mark:
    """Where a value was written, and how."""

    place: str
    text: str


@dataclass
class Document:
    """A file's values, with the mark of each and the errors met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)  # their issue is among `issues`

    def refuse(self, place: str, path: KeyPath, message: str) -> None:
        self.issues.append(Issue(place, dotted(path), message))
        self.refused.add(path)


def dotted(path: KeyPath) -> str:
    """`("model", "levels", 0, "layer")` -> `model.levels[0].layer`; odd characters are escaped."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def shown(text: str, limit: int = 60) -> str:
    """`text` on one line, printable and not too long."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def resolve(text: str) -> Any:
    """The value of a plain scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    if text.lower() in _YES_OR_NO or _LIKE_A_NUMBER.fullmatch(text):
        return AmbiguousText(text)
    return text


class _Composer(yaml.SafeLoader):
    """Nodes only: aliases, anchors and tags are refused, since each value is written once and out."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        refused = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            refused = "anchors (&) and aliases (*) are not read; write the value out or, if it is text, in quotes"
        elif event.tag is not None:
            refused = "tags (!) are not read; write the bare value or, if it is text, in quotes"
        elif self.depth == MAX_DEPTH:
            refused = f"nested more than {MAX_DEPTH} deep"
        if refused:
            raise yaml.composer.ComposerError(None, None, refused, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(text: str, name: str) -> yaml.Node | None:
    """The one node of `text`, None if it is empty. Raises ConfigError with the line of a syntax error."""
    try:
        return _Composer(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"character {chr(error.character)!a}"
        raise ConfigError(f"{name}:{line}: not text: {character} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = shown(", ".join(part for part in (error.context, error.problem) if part), 160)
        line = mark.line + 1 if mark else 1
        hint = "; indent with spaces, not tabs" if "'\\t'" in what else ""
        raise ConfigError(f"{name}:{line}: cannot be read as YAML: {what}{hint}") from error
    except (ValueError, OverflowError) as error:  # PyYAML lets these out for escapes such as "\UFFFFFFFF"
        raise ConfigError(f"{name}:1: cannot be read as YAML: {shown(str(error), 160)}") from error


def build(node: yaml.Node, path: KeyPath, name: str, document: Document) -> Any:
    """The plain value of `node`; marks and errors go to `document`. `name` is its file or `command line`."""
    here = _place(node, name)
    document.marks.setdefault(path, Mark(here, _written(node)))
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, path, name, document)
    if isinstance(node, yaml.SequenceNode):
        return [build(item, (*path, i), name, document) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:
        return node.value
    if node.value == "":
        document.refuse(here, path, "nothing is written after it; give a value, or remove the key")
    return resolve(node.value)


def _build_mapping(node: yaml.MappingNode, path: KeyPath, name: str, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = _place(key_node, name)
        if not isinstance(key_node, yaml.ScalarNode):
            document.refuse(here, (*path, _written(key_node)), "is no key; keys are plain words")
            continue
        inner = (*path, key_node.value)
        if key_node.value == "<<":
            document.refuse(here, inner, "merge keys are not read; write the values out")
        elif key_node.value in values:
            twice = f"written twice, first at {document.marks[inner].place}; remove one"
            document.issues.append(Issue(here, dotted(inner), twice))
        else:
            document.marks[inner] = Mark(here, _written(value_node))
            values[key_node.value] = build(value_node, inner, name, document)
    return values


def _place(node: yaml.Node, name: str) -> str:
    return name if name == COMMAND_LINE else f"{name}:{node.start_mark.line + 1}"


def _written(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a group of keys"
    start, end = node.start_mark, node.end_mark
    return start.buffer[start.pointer : end.pointer].strip() if start.buffer else ""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = type(resolve(text)) is str
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_group(dumper: yaml.SafeDumper, group: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", group, flow_style=False)  # a line for each key


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(dict, _represent_group)


def to_text(values: dict[str, Any]) -> str:
    """YAML that reads back equal."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=None
    )
