"""What differs between two runs' settings."""

from collections.abc import Sequence
from typing import Any


def changed_settings(before: dict[str, Any], after: dict[str, Any], free: Sequence[str]) -> list[str]:
    """`key: old -> new` of each dotted key that differs and does not start with one of `free`; both as `Config.resolved`."""
    old, new = flatten(before), flatten(after)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(tuple(free))
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
