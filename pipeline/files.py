"""Paths as people write them, files that are read in part or appear whole or not at all, and checksums."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO
from urllib.parse import unquote

BUFFER_BYTES = 1 << 20  # fewer and larger writes, which network disks need
USERINFO = re.compile(r"\w+://([^/]*|[^/@]*:(?!\d+/)[^@]*)@")  # a secret can have slashes, a port looks like one
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expand_path(text: str) -> str:
    """Return a path or URL with `~`, `$VAR` and `${VAR}` replaced as a shell does, and `file://` as a path.

    A path that exists as it is written stays. Raises ValueError for a variable that is not set, for an unknown user and, without
    repeating it, for a URL with a user name or password.
    """
    _refuse_userinfo(text)
    if "$" in text and os.path.exists(text):
        return text
    text = unquote(text.removeprefix("file://")) if text.startswith("file:///") else text
    path = os.path.expanduser(os.path.expandvars(text))
    if missing := VARIABLE.search(path):
        raise ValueError(f"{text}: the variable {missing[0]} is not set; set it, or write the path itself")
    if path.startswith("~") and not os.path.exists(path):
        raise ValueError(f"{text}: no such user; write the path itself, or ./{text}")
    _refuse_userinfo(path)
    return path


def _refuse_userinfo(place: str) -> None:
    if USERINFO.match(place):
        raise ValueError(
            f"{place.partition(':')[0]}://...@: a URL with a user name or password, which would end up in settings, logs and "
            "reports. Leave that part out; stores take credentials from the environment (docs/operating.md)"
        )


@contextmanager
def partial_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only when it is complete; on an error it is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process
        with partial.open("xb", BUFFER_BYTES) as file:  # exclusive: never through a link that somebody put there
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes | memoryview, durable: bool = True) -> None:
    """Write `path` through a temporary file and a rename, so that a crash or a full disk leaves the old content.

    `durable` flushes to disk first; files that a later write repeats, such as a heartbeat, do without. Raises OSError, and then
    leaves no temporary file behind.
    """
    with partial_file(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def open_append(path: Path) -> TextIO:
    """Open a text file to append to, made if there is none. Raises OSError for a link: it can lead to any file of this user."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a")


def read_bytes(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Return a file, or `size` bytes from `offset` on, fewer at its end. Raises FileNotFoundError, ValueError if unreadable."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None


def read_whole(path: Path, limit: int) -> bytes:
    """Return the content of a file. Raises as `read_bytes`, and ValueError above `limit` bytes."""
    content = read_bytes(path, 0, limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: longer than the {limit:,} bytes that it can have")
    return content


def file_checksum(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
