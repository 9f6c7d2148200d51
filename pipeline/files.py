"""Files that appear whole or not at all, and their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BUFFER_BYTES = 1 << 20  # fewer and larger writes, which network disks need


@contextmanager
def partial_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only when it is complete; on an error it is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb", BUFFER_BYTES) as file:
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


def file_checksum(path: Path, kind: str = "sha256") -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
