"""Read tars by their headers: nothing is extracted, and memory stays bounded whatever the headers claim."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

MAX_HEADER_BYTES = 1 << 20  # of a long name or PAX record; a longer one is an attack, not a name
LONGEST_PADDING = 1 << 20  # bytes of zeros that a tar may end with: writers fill up a record, mostly of 10 KB


class TarMember(NamedTuple):
    """A regular file inside a tar: its content is `[offset, offset + size)` of the tar itself."""

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
    """Regular files of the uncompressed tar in bytes `[start, stop)` of a file (a tar inside a tar has `start` > 0).

    Links, devices, sparse files and folders are skipped. Names are returned as stored: use them as labels, never as paths.
    Raises ValueError for damage.
    """
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            file.seek(start)
            with tarfile.open(fileobj=cast(IO[bytes], _HeaderReader(file)), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
                    if member.offset >= end:
                        break
                    if member.issparse():
                        continue
                    if not 0 <= member.size <= end - member.offset_data:
                        raise ValueError(
                            f"{member.name} at byte {member.offset:,} claims {member.size:,} bytes, past the end: "
                            "truncated or forged. Copy it again"
                        )
                    if member.isreg():
                        yield TarMember(member.name, member.offset_data, member.size)
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
