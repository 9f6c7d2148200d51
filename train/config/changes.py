"""Settings by dotted key, and the differences between those of two runs."""

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key; an empty section counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    """Return `key: old -> new` for each dotted key that differs and does not start with one of `free`.

    Both are `Config.resolved`.
    """
    old, new = flatten(before), flatten(after)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(tuple(free))
    ]
