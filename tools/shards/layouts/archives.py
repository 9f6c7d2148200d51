"""Small compressed archives, unpacked into memory under a limit."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Container
from pathlib import Path

MAX_UNPACKED = 512 << 20  # three times the largest archive that is read this way, CIFAR


def read_maybe_gzip(path: Path) -> bytes:
    """Read a file, unpacked when its name ends in `.gz`. Raises ValueError for damage or a file above the limit."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_UNPACKED + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a readable .gz file ({error}): download it again") from None
    if len(content) > MAX_UNPACKED:
        raise ValueError(f"{path}: unpacks to more than {MAX_UNPACKED >> 20} MiB: not the archive it is named after")
    return content


def read_tgz(path: Path, names: Container[str]) -> dict[str, bytes]:
    """Return the regular files of a small `.tar.gz` whose base name is in `names`. Raises ValueError as `read_maybe_gzip`."""
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read_maybe_gzip(path)), mode="r:") as tar:
            for member in tar:
                base = member.name.rpartition("/")[2]
                if member.isreg() and base in names and (file := tar.extractfile(member)) is not None:
                    contents[base] = file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable .tar.gz ({error}): download it again") from None
    return contents
