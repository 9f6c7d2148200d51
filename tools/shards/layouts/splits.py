"""Which folders and files belong to a split, by their names."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.shards.tar import is_hidden

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_ANY = "|".join(f"(?P<{split}>{'|'.join(names)})" for split, names in SPLIT_NAMES.items())
_WHAT = "set|split|data|images?|imgs?"
# `Training`, `val2017`, `training_set`, `test-images`, `seg_train`
SPLIT_FOLDER = re.compile(rf"(?:(?:seg|{_WHAT})[-_ ]?)?(?:{_ANY})(?:[-_ ]?(?:{_WHAT}|\d{{4}}))?", re.IGNORECASE)


def split_of(folder: str) -> str:
    """The split that a folder is named after, in any case and by any usual name: train, val, test, or ""."""
    match = SPLIT_FOLDER.fullmatch(folder.strip())
    return next((split for split in SPLIT_NAMES if match[split]), "") if match else ""


def visible_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def one_of_split(folders: Iterable[str], split: str, where: str) -> str:
    """The folder of the split, "" when there is none. Raises ValueError when there are two."""
    ours = [name for name in folders if split_of(name) == split]
    if len(ours) > 1:
        raise ValueError(
            f"{where}: {' and '.join(ours)} are both named after the {split} split: give the one to convert"
        )
    return ours[0] if ours else ""


def split_root(path: Path, split: str) -> Path | None:
    """The folder in `path` that is named after the split where there is one, else the path itself, if it is a folder."""
    if not path.is_dir():
        return None
    return path / one_of_split(visible_folders(path), split, str(path))


def files_of_split(files: list[Path], split: str, root: Path | None = None) -> list[Path]:
    """Where some files are named after a split, only those of ours; else those named after no split.

    With `root`, the folders below it that they lie in count too.
    """
    named = {file: _splits_in(str(file.relative_to(root)) if root else file.name) for file in files}
    ours = [file for file in files if split in named[file]]
    return ours or [file for file in files if not named[file]]


def _splits_in(name: str) -> set[str]:
    found = re.finditer(rf"(?<![a-z])(?:{_ANY})(?![a-z])", name, re.IGNORECASE)
    return {str(match.lastgroup) for match in found}


def check_no_splits(names: Iterable[str], start: int, where: str) -> None:
    """Raise ValueError when images lie in folders of splits inside a class: `names[start:]` is `class/.../image`."""
    for folder in sorted({name[start:].rpartition("/")[0] for name in names}):
        parts = folder.split("/")[1:]
        if found := [part for part in parts if split_of(part)]:
            raise ValueError(
                f"{where}: the class {folder.split('/')[0]} holds a folder {found[0]}, named after a split: splits are not "
                "mixed. Arrange the images as SPLIT/CLASS/IMAGE, or rename the folder if it is none"
            )


def plain_name(path: Path) -> str:
    """A name of letters, digits and dashes for the shards of a source."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "images"
