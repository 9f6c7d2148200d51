"""Read tars by their headers: nothing is extracted, and memory stays bounded whatever the headers claim."""

import logging
import os
import tarfile
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
# Images that only `make_shards.py convert` reads.
CONVERTIBLE = frozenset({"avif", "bmp", "gif", "heic", "heif", "jfif", "jpe", "mpo", "pgm", "ppm", "tif", "tiff", "webp"})
# Long names and PAX records (macOS stores attributes there) are headers too. A longer one is treated as malicious.
MAX_HEADER_BYTES = 1 << 24
MAX_PADDING = 1 << 20  # bytes of zeros that a tar can end with: writers fill up a record, mostly of 10 KB
# Folders that file servers and systems leave: macOS in zips, Synology, QNAP, Windows, Linux.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler",
     "system volume information", "lost+found", "__pycache__")
)  # fmt: skip


class TarMember(NamedTuple):
    """A file inside a tar: its content is `[offset, offset + size)` of the tar itself."""

    name: str
    offset: int
    size: int


class _HeaderReader:
    """The file as tarfile sees it: small reads only, since tarfile would read a name of any length into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes before byte {self.tell():,}: damaged or forged")
        return self._file.read(size)


def tar_members(path: Path, start: int = 0, stop: int | None = None) -> list[TarMember]:
    """List the files of the uncompressed tar in bytes `[start, stop)` of a file (a tar inside a tar has `start` > 0).

    Tars that were joined by `cat` are read one after the other. Inside each, the last file of a name replaces the earlier ones,
    as when tar extracts them, and a hard link is the file that it names. Symbolic links and sparse files are left out with a
    warning, devices and folders silently. Use names as labels, never as paths. Raises ValueError for damage.
    """
    left_out: list[str] = []
    replaced: list[str] = []
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            members, start = _read_part(file, start, end, left_out, replaced)
            while start < end:
                part, start = _read_part(file, start, end, left_out, replaced)
                members += part
    except tarfile.TarError as error:
        raise ValueError(f"{path}: {tar_kind(path)}, not a readable tar ({error}). Copy it again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions") from None
    if left_out:
        warn_once(f"{path}: {len(left_out):,} members without content in this tar are left out, the first: {left_out[0]}")
    if replaced:
        warn_once(f"{path}: {len(replaced):,} members are replaced by later ones of their name, as tar does: {replaced[0]}, ...")
    return members


def _read_part(file: BinaryIO, start: int, end: int, left_out: list[str], replaced: list[str]) -> tuple[list[TarMember], int]:
    """List the files of the tar at byte `start`, up to its end marker; returns them and where the next tar starts, or `end`."""
    members: dict[str, TarMember] = {}
    file.seek(start)
    with tarfile.open(fileobj=cast(IO[bytes], _HeaderReader(file)), mode="r:") as tar:
        while (info := tar.next()) is not None and info.offset < end:
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
            name, offset, size = _plain_name(info.name), info.offset_data, info.size
            linked = members.get(_plain_name(info.linkname)) if info.islnk() else None
            if linked is not None:
                offset, size = linked.offset, linked.size
            elif info.issparse() or info.islnk() or info.issym():
                left_out.append(f"{info.name} ({'a sparse file' if info.issparse() else 'a link'})")
                continue
            if not 0 <= size <= end - offset:
                where = f"{info.name} at byte {info.offset:,}"
                raise ValueError(f"{where} claims {size:,} bytes, past the end: truncated or forged. Copy it again")
            if linked is not None or info.isreg():
                if members.pop(name, None):
                    replaced.append(name)
                members[name] = TarMember(name, offset, size)
        # tarfile takes a damaged header for the end of the tar. Its real end are two blocks of zeros or more.
        padding = os.pread(file.fileno(), max(0, min(MAX_PADDING + tarfile.BLOCKSIZE, end - tar.offset)), tar.offset)
        num_zeros = len(padding) - len(padding.lstrip(b"\0"))
        if num_zeros > MAX_PADDING:
            raise ValueError(f"zeros at byte {tar.offset:,} of {end:,}: damaged. Copy it again")
        if num_zeros < len(padding):
            if num_zeros < 2 * tarfile.BLOCKSIZE:
                raise ValueError(f"no tar header at byte {tar.offset:,}: not a tar, or damaged. Copy it again")
            end = tar.offset + num_zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return list(members.values()), end


def _plain_name(name: str) -> str:
    """Return `a/b` for `./a/b`, since a tar can hold both forms, and for `a\\b`, as some writers on Windows store it."""
    name = name.removeprefix("./")
    return name if "/" in name else name.replace("\\", "/")


def sample_key(name: str) -> tuple[str, str]:
    """The key that the members of one WebDataset sample share, and the member's extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.rpartition(".")
    return folder + slash + stem, extension.lower()


def is_hidden(name: str) -> bool:
    """A dot file, or a file in a dot folder or a system's folder: macOS leaves one `._x.jpg` for every `x.jpg` in tars."""
    return any(part.lower() in SYSTEM_FOLDERS or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


@cache
def warn_once(message: str) -> None:
    """Log a warning about a tar, which is read more than once, only once."""
    log.warning("%s", message)


def tar_kind(path: Path) -> str:
    """Return what a file called .tar is, in words."""
    with path.open("rb") as file:
        return head_kind(file.read(tarfile.BLOCKSIZE))


def head_kind(head: bytes) -> str:
    """Return what a file is from its first 512 bytes: "a tar", or what it is instead."""
    if not head:
        return "empty"
    if head.startswith(b"\x1f\x8b"):
        return "compressed with gzip (`gunzip` it)"
    if not any(head):
        return "zero-filled, at least at its head"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "not a tar"
    return "a tar"
