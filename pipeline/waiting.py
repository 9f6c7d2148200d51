"""No silent waits."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told_after(seconds: float, text: str) -> Iterator[None]:
    """Print the text to stderr when the work inside takes longer than that."""
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
