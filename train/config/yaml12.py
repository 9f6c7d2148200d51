"""YAML 1.2, strictly: a plain scalar is a decimal number, true, false, null, ~, or else text; a key occurs once.

PyYAML alone reads 1e-4 as text, 010 as 8, 1:30 as 90, `on` as true, and keeps the last of two equal keys.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]
MAX_DEPTH = 20
COMMAND_LINE = 1_000_000_000  # the line of a value from the command line: after those of any file
_TAG = "tag:yaml.org,2002:"
# The first match decides; what matches none is text. 18 digits always fit 64 bits.
_PATTERNS = {
    f"{_TAG}null": r"(null|~|)\Z",
    f"{_TAG}bool": r"(true|false)\Z",
    f"{_TAG}int": r"[-+]?(0|[1-9][0-9]{0,17})\Z",
    f"{_TAG}float": r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*|(?=[eE]))|\.[0-9]+)([eE][-+]?[12]?[0-9]{1,2})?\Z",
    "!ambiguous": r"(?i)([-+]?\.?([0-9][0-9_:.]*|0[xob][0-9a-f_]+|inf|nan)(e[-+]?[0-9]+)?|on|off|yes|no|y|n|true|false)\Z",
}
_RESOLVERS: Any = {None: [(tag, re.compile(pattern)) for tag, pattern in _PATTERNS.items()]}


class ConfigError(ValueError):
    """Everything that is wrong with a config: one line for each error."""


class AmbiguousText(str):
    """Plain text that another YAML reader would take for a number or a boolean, such as 010, 1:30 or `on`."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        refused = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            refused = "anchors (&), aliases (*) and tags (!) are not supported; write the value out, or quote text"
        elif self.depth == MAX_DEPTH:
            refused = f"nested more than {MAX_DEPTH} deep"
        if refused:
            raise yaml.composer.ComposerError(None, None, refused, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_constructor("!ambiguous", lambda _, node: AmbiguousText(node.value))


def compose(text: str) -> yaml.Node | None:
    """The one node of `text`, None if it is empty. Raises ConfigError: `LINE: message`."""
    try:
        return _Loader(text).get_single_node()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two are for escapes such as "\UFFFFFFFF"
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        what = ", ".join(filter(None, (getattr(error, name, None) for name in ("context", "problem")))) or str(error)
        hint = "; indent with spaces, not tabs" if "'\\t'" in what else ""
        raise ConfigError(f"{line + 1}: invalid YAML: {shown(what, 160)}{hint}") from error


class Mark(NamedTuple):
    """Where a value was written, and how; `override` is the whole `section.key=value`, empty in a file."""

    line: int
    text: str
    override: str


@dataclass
class Document:
    """A file's values with overrides applied, the mark of each, and the errors found so far as (line, message)."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    issues: list[tuple[int, str]] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)  # keys without a value, which are among the issues

    def build(self, node: yaml.Node, path: KeyPath, override: str = "") -> Any:
        """The plain value of `node`; its marks and errors are recorded."""
        self.marks.setdefault(path, _mark(node, node, override))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), override) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            if node.value == "" and node.style is None:
                self.add_issue(path, "has no value; give one, or remove the key")
                self.refused.add(path)
            return _Loader("").construct_object(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _mark(key_node, value_node, override)
            is_valid = isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<"
            key = (*path, key_node.value if is_valid else _written(key_node))
            if not is_valid:
                self.add_issue(key, "invalid key; keys must be strings, and merge keys (<<) are not supported", mark)
            elif key[-1] in values:
                self.add_issue(key, f"duplicate key, first at {self.place(self.marks[key])}; remove one", mark)
            else:
                self.marks[key] = mark
                values[key_node.value] = self.build(value_node, key, override)
        return values

    def add_issue(self, path: KeyPath, message: str, mark: Mark | None = None) -> None:
        """Reports `message` at `mark`, or else where `path` was written."""
        mark = mark or self.marks[self.written_part(path)]
        key = dotted(path)
        if mark.override:
            key = shown(mark.override) + ("" if mark.override.startswith(f"{key}=") else f": {key}")
        self.issues.append((mark.line, f"{self.place(mark)}: {key}: {message}"))

    def place(self, mark: Mark) -> str:
        return "command line" if mark.override else f"{self.name}:{mark.line}"

    def written_part(self, path: KeyPath) -> KeyPath:
        """`path` as far as it was written; behind that, pydantic names the types it tried."""
        return next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.marks)


def _mark(start: yaml.Node, value: yaml.Node, override: str) -> Mark:
    return Mark(COMMAND_LINE if override else start.start_mark.line + 1, _written(value), override)


def _written(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    start, end = node.start_mark, node.end_mark
    return start.buffer[start.pointer : end.pointer].strip() if start.buffer else ""


def dotted(path: KeyPath) -> str:
    """`("model", "levels", 0, "layer")` -> `model.levels[0].layer`; odd characters are escaped."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def shown(text: str, limit: int = 60) -> str:
    """`text` on one line, printable and not too long."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')

    def represent_section(self, section: dict[str, Any]) -> yaml.MappingNode:
        return self.represent_mapping(f"{_TAG}map", section, flow_style=False)  # a line for each key


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(dict, _Dumper.represent_section)


def to_text(values: dict[str, Any]) -> str:
    """YAML that reads back equal, each key and its value on one line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=None
    )
