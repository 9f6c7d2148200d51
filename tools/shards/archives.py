"""Small compressed archives, read into memory under limits; and the checksums of the official downloads."""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

MAX_UNPACKED = 512 << 20

# md5 as published with each download
OFFICIAL_MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
}


class LimitedStream:
    """Reads a stream up to a limit, whatever a compressed file expands to."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, path: Path, limit: int = MAX_UNPACKED) -> None:
        self.stream, self.path, self.left, self.limit = stream, path, limit, limit

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            limit = f"{self.limit >> 20} MiB"
            raise ValueError(f"{self.path}: unpacks to more than {limit}: not the archive it is named after")
        return content


def read_tgz(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The regular files of a small `.tar.gz` whose base name is wanted. Raises ValueError for damage or excess."""
    found = {}
    try:
        with (
            gzip.open(path) as unzipped,
            tarfile.open(fileobj=cast(IO[bytes], LimitedStream(unzipped, path)), mode="r|") as tar,
        ):
            for member in tar:
                base = member.name.rpartition("/")[2]
                if member.isreg() and wanted(base) and (file := tar.extractfile(member)) is not None:
                    found[base] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a readable .tar.gz ({error}): download it again") from None
    return found


def read_maybe_gzip(path: Path) -> bytes:
    """A whole file, unpacked when its name ends in `.gz`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return LimitedStream(file, path).read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a readable .gz file ({error}): download it again") from None


def check_official(path: Path) -> list[str]:
    """Compare the archives at a path with their published md5; returns their names. Raises ValueError for a wrong one or none."""
    files = [path] if path.is_file() else [path / name for name in OFFICIAL_MD5 if (path / name).is_file()]
    for file in files:
        expected = OFFICIAL_MD5.get(file.name)
        if expected is None:
            raise ValueError(f"{file}: --official supports only {', '.join(OFFICIAL_MD5)}")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
        if found != expected:
            raise ValueError(f"{file}: wrong archive, md5 {found}, expected {expected}: download it again")
    if not files:
        raise ValueError(f"{path}: --official found none of {', '.join(OFFICIAL_MD5)}")
    return [file.name for file in files]
