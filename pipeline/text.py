"""Counts and lists in messages."""

from collections.abc import Sequence

MAX_NAMED = 5


def plural(count: int, noun: str) -> str:
    """`plural(1, "image")` is `1 image`, `plural(2000, "image")` is `2,000 images`; nouns that take a plain s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def truncate_list(names: Sequence[str], limit: int = MAX_NAMED) -> str:
    """`a, b, c`, or the first `limit` names and how many there are: `a, b, ... (7)`."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "")
