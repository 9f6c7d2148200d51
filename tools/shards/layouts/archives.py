"""Small compressed archives, unpacked into memory under a limit; and the checksums of the official downloads."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Container
from pathlib import Path

from pipeline.files import file_checksum

MAX_UNPACKED = 512 << 20  # three times the largest archive that is read this way, CIFAR

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


def check_official(path: Path) -> list[str]:
    """Compare the archives at a path with their published md5; returns their names.

    Raises ValueError for a wrong checksum, and when there is no official archive.
    """
    files = [path] if path.is_file() else [path / name for name in OFFICIAL_MD5 if (path / name).is_file()]
    for file in files:
        expected = OFFICIAL_MD5.get(file.name)
        if expected is None:
            raise ValueError(f"{file}: --official supports only {', '.join(OFFICIAL_MD5)}")
        if (actual := file_checksum(file, "md5")) != expected:
            raise ValueError(f"{file}: wrong archive, md5 {actual}, expected {expected}: download it again")
    if not files:
        raise ValueError(f"{path}: --official needs one of {', '.join(OFFICIAL_MD5)}")
    return [file.name for file in files]
