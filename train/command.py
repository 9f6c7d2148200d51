"""How every command prints its messages and its errors, and how signals stop a run."""

import argparse
import errno
import io
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self, TextIO, cast

from rich.console import Console

from pipeline.files import expand_path
from pipeline.shards.copied import is_remote
from pipeline.text import printable

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes
SETTING = "section.key=value"
EXTRAS = {"onnxruntime": "onnx", "onnxscript": "onnx", "transformers": "transformers", "pyarrow": "parquet"}  # of pyproject.toml
LOGGED_PACKAGES = ("pipeline", "model", "train", "tools")

log = logging.getLogger(__name__)


class ConsoleHandler(logging.Handler):
    """Prints each record as one plain line. rich's own handler lays it out as a table, which folds long lines in a pipe."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(printable(self.format(record), "\n"), markup=False, highlight=False, soft_wrap=True)


def show_messages(console: Console | None = None) -> None:
    """Print what the project's modules log on `console`, by default stderr; a second call replaces the first."""
    handler = ConsoleHandler(console or Console(stderr=True))
    for name in LOGGED_PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)


class CommandParser(argparse.ArgumentParser):
    """Takes `--a_b` for `--a-b` and the reverse, and says how a setting is written where an unknown flag looks like one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [self._known_spelling(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)

    def _known_spelling(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        spellings = (flag, f"--{flag[2:].replace('_', '-')}", f"--{flag[2:].replace('-', '_')}") if flag.startswith("--") else ()
        return next((f"{known}{equals}{value}" for known in spellings if known in self._option_string_actions), word)

    def add_json(self, what: str) -> None:
        """Add `--json FILE`, for `write_json`; `-` or no file is stdout."""
        self.add_argument("--json", nargs="?", const="-", metavar="FILE", help=f"Write {what} to this file, or to stdout.")

    def error(self, message: str) -> NoReturn:
        from train.config.load import meant_keys

        found = re.match(r"unrecognized arguments: --?([a-zA-Z][\w.-]*)(?:[= ](\S+))?", message)
        takes_settings = any(action.metavar == SETTING for action in self._actions)
        if found and takes_settings and (keys := meant_keys(found[1].replace("-", "_"))):
            value = found[2] or "..."
            message += f"; write {' or '.join(f'{key}={value}' for key in keys)}"
        super().error(message)


def write_json(target: str, value: Any) -> None:
    """Write `value` to the file `target`, whose folder is made; `-` is stdout."""
    text, path = json.dumps(value, indent=1) + "\n", Path(expand_path(target))
    if target == "-":
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def device_argument(text: str) -> str:
    """Return the device of a command line; `cuda` is another name for gpu."""
    return "gpu" if text == "cuda" else text


def count_argument(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def place_argument(text: str) -> Path | str:
    """Return a path of the command line, expanded, or the URL of a prefix in a store."""
    try:
        place = expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return place if is_remote(place) else Path(place)


def path_argument(text: str) -> Path:
    """Return a path of the command line, expanded; the type of such arguments."""
    if is_remote(place := place_argument(text)):
        raise argparse.ArgumentTypeError(f"{place}: must be on this machine; copy from or to the store with its own tool")
    return Path(place)


class Output:
    """A stream whose failure ends no command. The rest is dropped; for any cause but a reader that has gone, stderr says so."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[..., object], *arguments: str) -> None:
        try:
            work(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for libraries and the end of Python as well
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
                print(f"output lost: {error.strerror}; the command goes on without it", file=sys.stderr)


def run_command(name: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Return the exit code of `work()`, which is what it returns, or 0 for None.

    Bad input (ValueError, OSError, a missing package) becomes one line on stderr and exit code 2, Ctrl-C exit code 130. Any
    other exception is a bug and keeps its traceback.
    """
    with _output_may_fail():
        try:
            return work() or 0
        except (ValueError, OSError) as error:
            message, code = str(error), BAD_INPUT
        except ModuleNotFoundError as error:
            install = "pip install --require-hashes -r requirements.lock; python tools/doctor.py says more"
            if error.name in EXTRAS:
                install = f"pip install -e '.[{EXTRAS[error.name]}]'"
            message, code = f"{error}: {install}", BAD_INPUT
        except KeyboardInterrupt:
            message, code = interrupted, INTERRUPTED
        print(f"{name}: {printable(message, chr(10))}", file=sys.stderr)
        return code


@contextmanager
def _output_may_fail() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):  # file names need not be text that a terminal can print
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast(Any, [stream and Output(stream) for stream in streams])
    try:
        yield
    finally:
        print(end="", flush=True)
        sys.stdout, sys.stderr = streams


@contextmanager
def on_signal(number: int, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Call `handler` when the signal arrives while open."""
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


class StopSignal(ExitStack):
    """While open, SIGINT, SIGTERM and SIGUSR1 only set `asked`; a second SIGINT, a second later or more, interrupts at once.

    So does SIGHUP under torchrun, which kills its ranks half a minute after its terminal was closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self._asked_at = 0.0

    def __enter__(self) -> Self:
        hangup = (signal.SIGHUP,) if "TORCHELASTIC_RUN_ID" in os.environ else ()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *hangup):
            self.enter_context(on_signal(number, self._handle))
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked:
            # Under torchrun, one Ctrl-C arrives twice: from the terminal, and forwarded.
            if number == signal.SIGINT and now - self._asked_at > 1:
                raise KeyboardInterrupt
            return
        self.asked, self._asked_at = True, now
        log.warning(f"{signal.Signals(number).name}: finishing the step and saving; Ctrl-C exits at once")
