"""Which folders and files belong to a split, judged by their names."""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from pipeline.shards.tar import is_hidden
from pipeline.text import truncate_list

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval"), "test": ("test", "testing")}
_ANY = "|".join(f"(?P<{split}>{'|'.join(names)})" for split, names in SPLIT_NAMES.items())
SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{_ANY})(?![a-z])", re.IGNORECASE)
_NOUN = "set|split|data|images?|imgs?"
# `Training`, `val2017`, `training_set`, `test-images`, `seg_train`
SPLIT_FOLDER = re.compile(rf"(?:(?:seg|{_NOUN})[-_ ]?)?(?:{_ANY})(?:[-_ ]?(?:{_NOUN}|\d{{4}}))?", re.IGNORECASE)


class NoSplitError(ValueError):
    """There are images, of other splits than the one that is asked for."""


def split_of(folder: str) -> str:
    """Return the split that a folder is named after: train, val, test, or ""."""
    match = SPLIT_FOLDER.fullmatch(folder.strip())
    return next((split for split in SPLIT_NAMES if match[split]), "") if match else ""


def visible_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def folder_of_split(folders: Iterable[str], split: str, where: str) -> str:
    """Return the folder of the split, "" when there is none. Raises ValueError when there are two."""
    ours = [name for name in folders if split_of(name) == split]
    if len(ours) > 1:
        raise ValueError(f"{where}: {' and '.join(ours)} are both named after the {split} split: convert one of them")
    return ours[0] if ours else ""


def choose_split(folders: Collection[str], split: str, where: str) -> tuple[str, list[str]]:
    """Return the folder of the split, "" when no folder is named after a split; and the folders of no split.

    `folders` hold images; "" stands for images outside of folders. Raises NoSplitError when the split has no folder among
    those of other splits, ValueError when other folders lie next to those.
    """
    splits, others = (sorted(name for name in folders if bool(split_of(name)) == is_split) for is_split in (True, False))
    ours = folder_of_split(splits, split, where)
    if splits and not ours and not others:
        raise NoSplitError(
            f"{where}: no {split} images: the folders in it are {truncate_list(splits)}. Choose another --split, or convert "
            f"the folder that is to be the {split} split, such as {splits[0]}"
        )
    if splits and not ours:
        raise mixed_splits(splits[0], others, where)
    return ours, others


def mixed_splits(folder: str, others: list[str], where: str) -> ValueError:
    return ValueError(
        f"{where}: the folder {folder} is named after a split and lies next to {truncate_list([o or 'images' for o in others])}: "
        "convert the folder of one split, or rename it if it is a class"
    )


def files_of_split(files: list[Path], split: str, root: Path) -> list[Path]:
    """Return the files that are named after the split, where there are some, else those named after no split.

    The names of the folders between `root` and a file count too.
    """
    named = {file: {word.lastgroup for word in SPLIT_WORD.finditer(str(file.relative_to(root)))} for file in files}
    ours = [file for file in files if split in named[file]]
    return ours or [file for file in files if not named[file]]


def check_no_splits(names: Iterable[str], start: int, where: str) -> None:
    """Raise ValueError for folders of splits inside a class. `names[start:]` is `class/.../image`."""
    for folder in sorted({name[start:].rpartition("/")[0] for name in names}):
        label, *parts = folder.split("/")
        if inner := next(filter(split_of, parts), ""):
            raise ValueError(
                f"{where}: the class {label} holds a folder {inner}, named after a split: splits are not mixed. Arrange the "
                "images as SPLIT/CLASS/IMAGE, or rename the folder if it is none"
            )


def plain_name(path: Path) -> str:
    """Return a name of letters, digits and dashes for the shards of a source."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "images"
