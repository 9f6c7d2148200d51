"""Names what a file that is no image we read is, from its first bytes or its extension, and says what to do with it."""

import io
import re

from PIL import TiffImagePlugin

from pipeline.shards.samples import PILLOW_FAULTS

SAMPLES_PER_PIXEL = 277  # the TIFF tag
UNPACK = "unpack it first: `{} NAME` (images barely grow)"
# Formats: a name, the first bytes, usual extensions, and what to do, where NAME stands for the file's name.
Foreign = tuple[str, bytes, tuple[str, ...], str]
PACKED: tuple[Foreign, ...] = (
    ("compressed with gzip", rb"\x1f\x8b", (".gz", ".tgz"), UNPACK.format("gunzip -k")),
    ("compressed with zip", rb"PK\x03\x04(?!.{26}[^\0]{0,99}\.npy)", (".zip",), UNPACK.format("unzip")),
    ("compressed with 7z", rb"7z\xbc\xaf\x27\x1c", (".7z",), UNPACK.format("7z x")),
    ("compressed with rar", rb"Rar!", (".rar",), UNPACK.format("unrar x")),
    ("compressed with bzip2", rb"BZh", (".bz2",), UNPACK.format("bunzip2 -k")),
    ("compressed with xz", rb"\xfd7zXZ", (".xz",), UNPACK.format("unxz -k")),
    ("compressed with zstd", rb"\x28\xb5\x2f\xfd", (".zst",), UNPACK.format("unzstd")),
)
OTHERS: tuple[Foreign, ...] = (
    ("DICOM", rb".{128}DICM", (".dcm", ".dicom"), "`dcm2img` of DCMTK writes PNG"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL ", (".jxl",), "`djxl` writes PNG or JPEG"),
    ("JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", (".jp2", ".j2k"), "`opj_decompress` writes PNG"),
    ("NumPy arrays", rb"\x93NUMPY|PK\x03\x04.{26}[^\0]{0,99}\.npy", (".npy", ".npz"), "write each image as a PNG"),
    ("a pointer of Git LFS", rb"version https://git-lfs", (), "`git lfs pull` fetches the file"),
    ("an HTML page", rb"\s*<(!DOCTYPE|html)", (), "the download failed: repeat it"),
    ("HEIC or AVIF", rb".{4}ftyp", (".heic", ".heif", ".avif"), "`pip install -U pillow pillow-heif` reads it where it is sound"),
)


def describe_foreign(content: bytes, name: str) -> str:
    """Return what a file is and what to do, "" where that is unknown. The first 256 bytes are enough for all but a TIFF."""
    for form, head, _, advice in (*PACKED, *OTHERS):
        if re.match(head, content, re.DOTALL | re.IGNORECASE):
            return f"{form}, {advice.replace('NAME', name)}"
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
