"""Which files are images, by name, and what the others are, so that none of them is left out silently."""

import io
import re
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from PIL import TiffImagePlugin, features

from pipeline.files import read_bytes
from pipeline.shards.index_file import FAULTS
from pipeline.shards.side_folders import MASK_END
from pipeline.text import plural, truncate_list

HEIC_IS_READ = find_spec("pillow_heif") is not None
if HEIC_IS_READ:
    import_module("pillow_heif").register_heif_opener()
AVIF_IS_READ = "avif" in features.modules and bool(features.check("avif"))  # Pillow 11.3 and later, in most builds
# Pillow's name of each format that is read, and its extensions. The first one stands for the format in messages.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    **({"AVIF": (".avif",)} if AVIF_IS_READ else {}),
    **({"HEIF": (".heic", ".heif")} if HEIC_IS_READ else {}),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

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

QUIET = "texts, lists or hidden files"  # counted, but reported only when the source has no image at all
QUIET_NAMES = frozenset({"index.npy", "thumbs.db", "desktop.ini", "readme", "license", "licence", "copying", "makefile"})
QUIET_EXTENSIONS = frozenset(
    ("txt", "json", "jsonl", "xml", "xmp", "csv", "tsv", "md", "yaml", "yml", "html", "log", "py", "sh", "ini", "cls", "idx",
     "md5", "sha256", "aae")
)  # fmt: skip
MAX_EXTENSION_LENGTH = 8  # a longer one is part of a name
MAX_KINDS = 8


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.lower().endswith(MASK_END)


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
            bands = directory.get(277, 1)  # the tag SamplesPerPixel
            return f"a TIFF of {bands} bands, write three of them" if bands > 4 else ""
        except FAULTS:
            pass  # damaged, which the caller says
    return ""


def describe_file(path: Path) -> str:
    return describe_foreign(read_bytes(path, 0, 256), path.name)


def file_kind(name: str) -> str:
    """Return the kind under which a file is counted: its extension, or QUIET."""
    base = name.rpartition("/")[2].lower()
    stem, _, extension = base.rpartition(".")
    if base.startswith(".") or base in QUIET_NAMES or extension in QUIET_EXTENSIONS:
        return QUIET
    if base.endswith(MASK_END):
        return "mask(s)"
    # The kind is printed, and the name can come from an untrusted archive.
    if not stem or len(extension) > MAX_EXTENSION_LENGTH or not (extension.isascii() and extension.isalnum()):
        return "without an extension"
    return f".tar.{extension}" if stem.endswith(".tar") else f".{extension}"


def describe_skipped(counts: Counter[str]) -> str:
    """Return one line on the skipped files, or "" when all of them are QUIET."""
    named = Counter({kind: number for kind, number in counts.items() if kind != QUIET and number > 0})
    formats = ", ".join(extensions[0].removeprefix(".") for extensions in FORMATS.values())
    why = f": unsupported formats (supported: {formats})" if any(kind.startswith(".") for kind in named) else ""
    return f"left out: {_listed(named, why)}" if named else ""


def describe_no_images(counts: Counter[str]) -> str:
    """Return what a source without images holds instead."""
    files = f"{plural(counts.total(), 'file')}, none of them an image in a supported format"
    return f"{files}: {_listed(counts)}" if counts.total() else "it is empty"


def _listed(counts: Counter[str], why: str = "") -> str:
    """Return how many files there are of each kind, `why`, and what to do with those of known kinds."""
    kinds = truncate_list([f"{number:,} {kind}" for kind, number in counts.most_common() if number > 0], MAX_KINDS)
    packed = sorted(kind for kind in counts if any(kind.endswith(extensions) for _, _, extensions, _ in PACKED))
    advice = {f"{form}: {text}": sum(counts[kind] for kind in extensions) for form, _, extensions, text in OTHERS}
    advice |= {f"unpack {', '.join(packed)} first": len(packed)}
    advice |= {"convert a .tar itself, or the folder that contains it": counts[".tar"]}
    return kinds + why + "".join(f"; {text}" for text, number in advice.items() if number)
