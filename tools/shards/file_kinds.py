"""Which files are images, by their names, and how the others are reported: no file is skipped silently."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from PIL import features

HEIC_IS_READ = find_spec("pillow_heif") is not None
AVIF_IS_READ = "avif" in features.modules and bool(features.check("avif"))  # Pillow 11.3 and later, in most builds
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
HEIC_EXTENSIONS = (".heic", ".heif")
EXTENSIONS = (
    *(*JPEG_EXTENSIONS, ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
    *((".avif",) if AVIF_IS_READ else ()),
    *(HEIC_EXTENSIONS if HEIC_IS_READ else ()),
)
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", *(("AVIF",) if AVIF_IS_READ else ()))

QUIET = "texts, lists or hidden files"  # counted, but listed only where there is no image at all
QUIET_NAMES = frozenset({"thumbs.db", "desktop.ini", "readme", "license", "licence", "copying", "makefile"})
LISTS = {"txt", "json", "jsonl", "xml", "xmp", "csv", "tsv", "md", "yaml", "yml", "html", "log", "py", "sh", "ini"}
QUIET_EXTENSIONS = frozenset(LISTS | {"cls", "idx", "npz", "md5", "sha256", "aae"})
NO_EXTENSION = "without an extension"
LONGEST_EXTENSION = 8
MOST_KINDS = 8
PACKERS = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
    b"Rar!": ("rar", "unrar x"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
PACKED = (".gz", ".tgz", ".zip", ".7z", ".rar", ".bz2", ".xz", ".zst")


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def kind(name: str) -> str:
    """What a file that is not an image is counted as: its extension, or QUIET."""
    base = name.rpartition("/")[2].lower()
    stem, _, extension = base.rpartition(".")
    if base.startswith(".") or base in QUIET_NAMES or extension in QUIET_EXTENSIONS:
        return QUIET
    # Names from untrusted archives are printed.
    if not stem or len(extension) > LONGEST_EXTENSION or not (extension.isascii() and extension.isalnum()):
        return NO_EXTENSION
    return f".tar.{extension}" if stem.endswith(".tar") else f".{extension}"


def describe_left_out(counts: Counter[str]) -> str:
    """One line on the files that were skipped, or "" when all of them are QUIET."""
    listed = _list(Counter({name: number for name, number in counts.items() if name != QUIET}))
    if not listed:
        return ""
    formats = ", ".join((*FORMATS, *(("HEIC",) if HEIC_IS_READ else ()))).lower().replace("jpeg", "jpg")
    why = f": unsupported formats (supported: {formats})" if any(name.startswith(".") for name in counts) else ""
    return f"left out: {listed}{why}{_advice(counts)}"


def describe_no_images(counts: Counter[str]) -> str:
    """What was found instead of images."""
    total = counts.total()
    if not total:
        return "it is empty"
    return f"{total:,} file{'s'[: total > 1]}, none of them an image in a supported format: {_list(counts)}{_advice(counts)}"


def _list(counts: Counter[str]) -> str:
    parts = [f"{number:,} {name}" for name, number in counts.most_common() if number > 0]
    more = len(parts) - MOST_KINDS
    return ", ".join(parts[:MOST_KINDS]) + (f" and {more} more kinds" if more > 0 else "")


def _advice(counts: Counter[str]) -> str:
    advice = []
    if any(counts[extension] for extension in HEIC_EXTENSIONS):
        advice.append("pip install pillow-heif adds .heic")
    if counts[".avif"]:
        advice.append("pip install -U pillow adds .avif")
    if packed := sorted(name for name in counts if name.endswith(PACKED)):
        advice.append(f"unpack {', '.join(packed)} first")
    if counts[".tar"]:
        advice.append("convert a .tar itself, or the folder that contains it")
    return "".join(f"; {text}" for text in advice)


def packed_with(path: Path) -> str:
    """How a file is compressed and how to unpack it, from its first bytes; "" when it is not compressed."""
    with path.open("rb") as file:
        head = file.read(max(map(len, PACKERS)))
    for magic, (packer, command) in PACKERS.items():
        if head.startswith(magic):
            return f"compressed with {packer}, unpack it first: `{command} {path.name}` (images barely grow)"
    return ""
