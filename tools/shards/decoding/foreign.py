"""Names what a file that is no image we read is, from its first bytes or its extension, and says what to do with it."""

import io
import re
from typing import NamedTuple

from PIL import TiffImagePlugin

from pipeline.shards.samples import PILLOW_FAULTS

SAMPLES_PER_PIXEL = 277  # the TIFF tag
UNPACK = "unpack it first: `{} NAME` (images barely grow)"


class Foreign(NamedTuple):
    """A format: its name, its first bytes, its usual extensions, and what to do about it. NAME stands for the file's name."""

    name: str
    head: bytes
    extensions: tuple[str, ...]
    advice: str


PACKED = (
    Foreign("compressed with gzip", rb"\x1f\x8b", (".gz", ".tgz"), UNPACK.format("gunzip -k")),
    Foreign("compressed with zip", rb"PK\x03\x04(?!.{26}[^\0]{0,99}\.npy)", (".zip",), UNPACK.format("unzip")),
    Foreign("compressed with 7z", rb"7z\xbc\xaf\x27\x1c", (".7z",), UNPACK.format("7z x")),
    Foreign("compressed with rar", rb"Rar!", (".rar",), UNPACK.format("unrar x")),
    Foreign("compressed with bzip2", rb"BZh", (".bz2",), UNPACK.format("bunzip2 -k")),
    Foreign("compressed with xz", rb"\xfd7zXZ", (".xz",), UNPACK.format("unxz -k")),
    Foreign("compressed with zstd", rb"\x28\xb5\x2f\xfd", (".zst",), UNPACK.format("unzstd")),
)
OTHERS = (
    Foreign("DICOM", rb".{128}DICM", (".dcm", ".dicom"), "`dcm2img` of DCMTK writes PNG"),
    Foreign("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL ", (".jxl",), "`djxl` writes PNG or JPEG"),
    Foreign("JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", (".jp2", ".j2k"), "`opj_decompress` writes PNG"),
    Foreign("NumPy arrays", rb"\x93NUMPY|PK\x03\x04.{26}[^\0]{0,99}\.npy", (".npy", ".npz"), "write each image as a PNG"),
    Foreign("a pointer of Git LFS", rb"version https://git-lfs", (), "`git lfs pull` fetches the file"),
    Foreign("an HTML page", rb"\s*<(!DOCTYPE|html)", (), "the download failed: repeat it"),
    Foreign(
        "HEIC or AVIF",
        rb".{4}ftyp",
        (".heic", ".heif", ".avif"),
        "`pip install -U pillow pillow-heif` reads it where it is sound",
    ),
)


def describe_foreign(content: bytes, name: str) -> str:
    """Return what a file is and what to do, "" where that is unknown. The first 256 bytes are enough for all but a TIFF."""
    for form in (*PACKED, *OTHERS):
        if re.match(form.head, content, re.DOTALL | re.IGNORECASE):
            return f"{form.name}, {form.advice.replace('NAME', name)}"
    if content.startswith((b"II*\0", b"MM\0*")):
        try:
            directory, file = TiffImagePlugin.ImageFileDirectory_v2(content[:8]), io.BytesIO(content)
            file.seek(directory.next)
            directory.load(file)
            bands = directory.get(SAMPLES_PER_PIXEL, 1)
            return f"a TIFF of {bands} bands, write three of them" if bands > 4 else ""
        except PILLOW_FAULTS:
            pass  # damaged, which the caller says
    return ""
