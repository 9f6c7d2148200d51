"""Read tars by their headers: nothing is extracted, and memory stays bounded whatever the headers claim."""

import logging
import os
import posixpath
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 1 << 24  # of a long name or PAX record (macOS stores attributes there); a longer one is an attack
LONGEST_PADDING = 1 << 20  # bytes of zeros that a tar may end with: writers fill up a record, mostly of 10 KB
# Folders that file servers and systems leave: macOS in zips, Synology, QNAP, Windows, Linux.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler",
     "system volume information", "lost+found", "__pycache__")
)  # fmt: skip
MAX_LINKS = 40  # of a chain, as in Linux


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


def tar_members(path: Path, start: int = 0, stop: int | None = None) -> Iterator[TarMember]:
    """Files of the uncompressed tar in bytes `[start, stop)` of a file (a tar inside a tar has `start` > 0).

    Links to a file of the same tar come last, with the content of that file. Other links and sparse files are left out with a
    warning, devices and folders silently. Names are returned as stored: use them as labels, never as paths. Raises ValueError
    for damage.
    """
    links: dict[str, str] = {}
    lost: list[str] = []
    for info in _headers(path, start, stop):
        if info.issparse():
            lost.append(f"{info.name} (a sparse file)")
        elif info.isreg():
            yield TarMember(info.name, info.offset_data, info.size)
        elif info.islnk() or info.issym():
            target = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(info.name), info.linkname)
            links[info.name] = posixpath.normpath(target)
    if links:
        found = _linked(path, start, stop, links)
        yield from found
        resolved = {member.name for member in found}
        lost += [f"{name} (a link to {links[name]})" for name in links if name not in resolved]
    if lost:
        warn_once(f"{path}: {len(lost):,} members without content in this tar are left out, the first: {lost[0]}")


def _linked(path: Path, start: int, stop: int | None, links: dict[str, str]) -> list[TarMember]:
    """The links that lead to a file of the tar, in their order. Reads the tar's headers again: only tars with links pay."""
    hops = {posixpath.normpath(name): target for name, target in links.items()}
    ends = {}
    for name, target in links.items():
        for _ in range(MAX_LINKS):
            if target not in hops:
                ends[name] = target
                break
            target = hops[target]
    wanted = set(ends.values())
    files = {}
    for info in _headers(path, start, stop):
        if info.isreg() and not info.issparse() and (name := posixpath.normpath(info.name)) in wanted:
            files[name] = (info.offset_data, info.size)
    return [TarMember(name, *files[end]) for name, end in ends.items() if end in files]


def _headers(path: Path, start: int, stop: int | None) -> Iterator[tarfile.TarInfo]:
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            file.seek(start)
            with tarfile.open(fileobj=cast(IO[bytes], _HeaderReader(file)), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
                    if member.offset >= end:
                        break
                    if not member.issparse() and not 0 <= member.size <= end - member.offset_data:
                        raise ValueError(
                            f"{member.name} at byte {member.offset:,} claims {member.size:,} bytes, past the end: "
                            "truncated or forged. Copy it again"
                        )
                    yield member
                _check_end(file, tar.offset, end)
    except (tarfile.TarError, ValueError) as error:
        kind = f"{tar_kind(path)}, not a readable tar (" if isinstance(error, tarfile.TarError) else ""
        raise ValueError(f"{path}: {kind}{error}{'). Copy it again' if kind else ''}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions") from None


def _check_end(file: BinaryIO, offset: int, end: int) -> None:
    """tarfile takes a damaged header for the end of the tar."""
    if any(os.pread(file.fileno(), min(tarfile.BLOCKSIZE, max(end - offset, 0)), offset)):
        raise ValueError(f"no tar header at byte {offset:,}: not a tar, or damaged. Copy it again")
    if end - offset > LONGEST_PADDING:
        raise ValueError(f"zeros at byte {offset:,} of {end:,}: damaged. Copy it again")


def sample_key(name: str) -> tuple[str, str]:
    """The key that the members of one WebDataset sample share, and the member's extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.rpartition(".")
    return folder + slash + stem, extension.lower()


def is_hidden(name: str) -> bool:
    """A dot file, or a file in a dot folder or a system's folder: macOS leaves one `._x.jpg` for every `x.jpg` in tars."""
    parts = name.split("/")
    return any(part.startswith(".") and part not in (".", "..") for part in parts) or any(
        part.lower() in SYSTEM_FOLDERS for part in parts
    )


@cache
def warn_once(message: str) -> None:
    """A tar is read more than once, and what is wrong with it is said once."""
    log.warning("%s", message)


def tar_kind(path: Path) -> str:
    """What a file called .tar is, in words."""
    with path.open("rb") as file:
        return head_kind(file.read(tarfile.BLOCKSIZE))


def head_kind(head: bytes) -> str:
    """The same, from the file's first 512 bytes."""
    if not head:
        return "empty"
    if head.startswith(b"\x1f\x8b"):
        return "compressed with gzip (`gunzip` it)"
    if not any(head):
        return "zero-filled, whole or at its head"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "not a tar"
    return "a tar"
