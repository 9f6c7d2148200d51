"""Reports on the files of a source that are not images, so that none of them is skipped silently."""

from collections import Counter
from pathlib import Path

from pipeline.text import plural, truncate_list
from tools.shards.decoding.foreign import OTHERS, PACKED, describe_foreign
from tools.shards.images import FORMATS, MASK_END

QUIET = "texts, lists or hidden files"  # counted, but reported only when the source has no image at all
QUIET_NAMES = frozenset({"index.npy", "thumbs.db", "desktop.ini", "readme", "license", "licence", "copying", "makefile"})
QUIET_EXTENSIONS = frozenset(
    ("txt", "json", "jsonl", "xml", "xmp", "csv", "tsv", "md", "yaml", "yml", "html", "log", "py", "sh", "ini", "cls", "idx",
     "md5", "sha256", "aae")
)  # fmt: skip
MAX_EXTENSION_LENGTH = 8  # a longer one is part of a name
MAX_KINDS = 8
HEAD_BYTES = 256


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
    listed = _list(Counter({kind: number for kind, number in counts.items() if kind != QUIET}))
    if not listed:
        return ""
    formats = ", ".join(extensions[0].removeprefix(".") for extensions in FORMATS.values())
    why = f": unsupported formats (supported: {formats})" if any(kind.startswith(".") for kind in counts) else ""
    return f"left out: {listed}{why}{_advice(counts)}"


def describe_no_images(counts: Counter[str]) -> str:
    """Return what a source without images holds instead."""
    if not counts.total():
        return "it is empty"
    files = plural(counts.total(), "file")
    return f"{files}, none of them an image in a supported format: {_list(counts)}{_advice(counts)}"


def _list(counts: Counter[str]) -> str:
    parts = [f"{number:,} {kind}" for kind, number in counts.most_common() if number > 0]
    return truncate_list(parts, MAX_KINDS)


def _advice(counts: Counter[str]) -> str:
    packed = sorted(kind for kind in counts if any(kind.endswith(extensions) for _, _, extensions, _ in PACKED))
    advice = {f"{form}: {text}": sum(counts[kind] for kind in extensions) for form, _, extensions, text in OTHERS}
    advice |= {f"unpack {', '.join(packed)} first": len(packed)}
    advice |= {"convert a .tar itself, or the folder that contains it": counts[".tar"]}
    return "".join(f"; {text}" for text, number in advice.items() if number)


def describe_file(path: Path) -> str:
    """Return what a file that is neither an image nor a tar is, and what to do, "" where that is unknown."""
    with path.open("rb") as file:
        return describe_foreign(file.read(HEAD_BYTES), path.name)
