"""How every command prints its messages and its errors."""

import io
import logging
import sys
from collections.abc import Callable

from rich.console import Console

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes
LOGGED_PACKAGES = ("pipeline", "model", "train", "tools")


class ConsoleHandler(logging.Handler):
    """Prints each record as one plain line. rich's own handler lays it out as a table, which folds long lines in a pipe."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def show_messages(console: Console | None = None) -> None:
    """Print what the project's modules log on `console`, by default stderr; a second call replaces the first."""
    handler = ConsoleHandler(console or Console(stderr=True))
    for name in LOGGED_PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)


def run_command(name: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Return the exit code of `work()`, which is what it returns, or 0 for None.

    Bad input (ValueError, OSError, a missing package) becomes one line on stderr and exit code 2, Ctrl-C exit code 130. Any
    other exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be text that a terminal can print
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        message, code = str(error), BAD_INPUT
    except ModuleNotFoundError as error:
        install = "pip install --require-hashes -r requirements.lock; python tools/doctor.py says more"
        message, code = f"{error}: {install}", BAD_INPUT
    except KeyboardInterrupt:
        message, code = interrupted, INTERRUPTED
    print(f"{name}: {message}", file=sys.stderr)
    return code
