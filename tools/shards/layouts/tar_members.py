"""Walk a tar by its headers: bounded memory whatever the headers claim, and nothing extracted."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_LONG_HEADER = 1 << 16  # bytes of a PAX or GNU long-name record; longer ones are an attack, not a name
MAX_MEMBERS = 50_000_000
REGULAR = (b"0", b"\0")


class TarMember(NamedTuple):
    """A regular file inside a tar: its bytes are `[offset, offset + size)` of the tar itself."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, start: int = 0, stop: int | None = None) -> Iterator[TarMember]:
    """Regular files of the uncompressed tar that lies in `[start, stop)` of a file (a tar inside a tar has `start` > 0).

    Links, devices, sparse files and folders are passed over. Names are returned as they are written: treat them as labels,
    never as paths. Raises ValueError for damage.
    """
    end = path.stat().st_size if stop is None else stop
    with path.open("rb") as file:
        long_name, count = "", 0
        while start + BLOCK <= end:
            block = os.pread(file.fileno(), BLOCK, start)
            if not block.strip(b"\0"):
                return
            size, kind = _checked_size(block, path, start), block[156:157]
            data = start + BLOCK
            if data + size > end:
                raise ValueError(
                    f"{path}: member at byte {start} claims {size:,} bytes, past the end: truncated or forged"
                )
            start = data + size + -size % BLOCK
            if kind in (b"x", b"L"):
                long_name = _long_name(file, data, size, kind) or long_name
            elif kind not in (b"g", b"K"):
                name = long_name or _short_name(block)
                if kind in REGULAR and not name.endswith("/"):
                    yield TarMember(name, data, size)
                long_name = ""
            count += 1
            if count > MAX_MEMBERS:
                raise ValueError(f"{path}: more than {MAX_MEMBERS:,} members")


def is_tar(path: Path, start: int = 0) -> bool:
    """Whether an uncompressed tar starts at this byte."""
    with path.open("rb") as file:
        block = os.pread(file.fileno(), BLOCK, start)
    try:
        _checked_size(block, path, start)
    except ValueError:
        return False
    return True


def _checked_size(block: bytes, path: Path, start: int) -> int:
    try:
        checksum = int(block[148:156].replace(b"\0", b" ").split()[0], 8)
        field = block[124:136]
        size = (
            int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.replace(b"\0", b" ").strip() or b"0", 8)
        )
    except (ValueError, IndexError):
        raise ValueError(f"{path}: no tar header at byte {start}: not a tar, or damaged") from None
    if len(block) < BLOCK or checksum != sum(block) - sum(block[148:156]) + 8 * 32 or size < 0:
        raise ValueError(f"{path}: the tar header at byte {start} has a wrong checksum: not a tar, or damaged")
    return size


def _short_name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _long_name(file: BinaryIO, data: int, size: int, kind: bytes) -> str:
    if size > MAX_LONG_HEADER:
        return ""
    content = os.pread(file.fileno(), size, data)
    if kind == b"L":
        return content.split(b"\0")[0].decode("utf-8", "surrogateescape")
    while content:  # PAX records: "<length> key=value\n"
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or int(length) == 0:
            return ""
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return ""
