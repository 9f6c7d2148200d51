"""Messages: counts, lists, and notices about long waits."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_NAMED = 5


def plural(count: int, noun: str) -> str:
    """`plural(1, "image")` is `1 image`, `plural(2000, "image")` is `2,000 images`; nouns that take a plain s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def truncate_list(names: Sequence[str], limit: int = MAX_NAMED) -> str:
    """`a, b, c`, or the first `limit` names and how many there are: `a, b, ... (7)`."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "")


@contextmanager
def notify_after(seconds: float, text: str) -> Iterator[None]:
    """Print the text to stderr if the body takes longer than that."""
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
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
