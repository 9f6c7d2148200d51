"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomic(path: Path, content: str | bytes | memoryview, durable: bool = True) -> None:
    """Write `path` through a temporary file and a rename, so that a crash or a full disk leaves the old content.

    `durable` flushes to disk first; files that a later write repeats, such as a heartbeat, do without. Raises OSError, and then
    leaves no temporary file behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
