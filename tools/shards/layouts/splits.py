"""Which folders and files belong to a split, by their names."""

import re
from pathlib import Path

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid")}
ALL_SPLITS = ("train", "val", "validation", "valid", "test")


def split_root(path: Path, split: str) -> Path | None:
    """`path/train` or `path/val` where there is one, else the path itself, if it is a folder."""
    candidates = (*(path / name for name in SPLIT_NAMES[split]), path)
    return next((folder for folder in candidates if folder.is_dir()), None)


def files_of_split(files: list[Path], split: str) -> list[Path]:
    """Where some files are named after a split, only those of ours; else those named after no split."""
    ours = [file for file in files if _is_named_after(file, SPLIT_NAMES[split])]
    return ours or [file for file in files if not _is_named_after(file, ALL_SPLITS)]


def _is_named_after(file: Path, names: tuple[str, ...]) -> bool:
    return re.search(rf"(?<![a-z])({'|'.join(names)})(?![a-z])", file.name.lower()) is not None


def plain_name(path: Path) -> str:
    """A name of letters, digits and dashes for the shards of a source."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "images"
