"""Messages: counts, lists, and notices about long waits."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MAX_NAMED = 5


def plural(count: int, noun: str) -> str:
    """`plural(1, "image")` is `1 image`, `plural(2000, "image")` is `2,000 images`; nouns that take a plain s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def truncate_list(names: Sequence[str], limit: int = MAX_NAMED) -> str:
    """`a, b, c`, or the first `limit` names and how many there are: `a, b, ... (7)`."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "")


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control characters, terminal escapes and broken letters as `\\x1b`, except for those in `keep`.

    Names of files and classes come from outside: printed as they are, they could move the cursor or retitle the terminal.
    """
    return text if text.isprintable() else "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )  # fmt: skip


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)])


def say(text: str) -> None:
    """Print lines at once, without the control characters of names in them."""
    print(printable(text, "\n"), flush=True)


@contextmanager
def notify_after(seconds: float, text: str) -> Iterator[None]:
    """Print the text to stderr if the body takes longer than that."""
    timer = threading.Timer(seconds, print, (printable(text),), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Every:
    """A rate limiter: `due()` is True once in every `seconds`, counted from its construction and each True."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
