"""Images in files of their own, by class folder or without labels; and what the names of folders say of split and class."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.side_folders import are_no_classes, common_folder, first_folder, main_folder
from pipeline.shards.tar import is_hidden
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, LooseFiles, Source
from tools.shards.formats import file_kind, is_image
from tools.shards.labels import number_labels

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval"), "test": ("test", "testing")}
_ANY = "|".join(f"(?P<{split}>{'|'.join(names)})" for split, names in SPLIT_NAMES.items())
SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{_ANY})(?![a-z])", re.IGNORECASE)
_NOUN = "set|split|data|images?|imgs?"
# `Training`, `val2017`, `training_set`, `test-images`, `seg_train`
SPLIT_FOLDER = re.compile(rf"(?:(?:seg|{_NOUN})[-_ ]?)?(?:{_ANY})(?:[-_ ]?(?:{_NOUN}|\d{{4}}))?", re.IGNORECASE)


class NoSplitError(ValueError):
    """There are images, of other splits than the one that is asked for."""


def walk_images(root: Path, below: str, skipped: Counter[str], linked: bool = False) -> Iterator[tuple[str, int]]:
    """Yield `(path relative to root, bytes)` of every image file, in an order that does not depend on the file system.

    Counts other files in `skipped` by kind. A link to a folder is followed where that lies outside of `root`, and not behind
    another link (`linked`): it could give images twice, or form a loop.
    """
    with os.scandir(root / below) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            target, top = (Path(entry).resolve(), root.resolve()) if entry.is_symlink() else (None, root)
            if target and (linked or target.is_relative_to(top) or top.is_relative_to(target)):
                skipped["folder link(s), not followed"] += 1
            elif not is_hidden(entry.name):
                yield from walk_images(root, name, skipped, linked or target is not None)
        elif not entry.is_file():
            skipped["broken link(s)"] += entry.is_symlink()
        elif is_image(entry.name) and not entry.name.startswith("."):
            yield name, entry.stat().st_size
        else:
            skipped[file_kind(entry.name)] += 1


def has_images(folder: Path) -> bool:
    return next(walk_images(folder, "", Counter()), None) is not None


def open_files(path: Path, split: str, spools: Path, labelled: bool | None = None) -> Source | None:
    """List a split's images by class folder. `labelled`: True leaves out images next to the folders, False all labels."""
    if not path.is_dir():
        return None
    skipped = Counter[str]()
    listed = list(walk_images(path, "", skipped))
    below = folder_of_split([name for name, _ in listed], split, str(path))
    files = [(name.removeprefix(below), size) for name, size in listed if name.startswith(below)]
    num_elsewhere, root, hint = len(listed) - len(files), path / below, ""
    num_loose = sum("/" not in name for name, _ in files)
    if labelled and num_loose:
        files = [(name, size) for name, size in files if "/" in name]
        hint = f"left out next to the folders: {plural(num_loose, 'image')}"
    elif 0 < num_loose < len(files):
        hint = "--layout folders takes only the images in folders"
    if not files:
        return None
    folders, why = ([], "") if labelled is False else class_folders([name for name, _ in files], 0, str(root))
    labels, classes = number_labels(folders or [UNLABELLED] * len(files))
    catalogue = Catalogue([LooseFiles(root)])
    for label, (name, size) in sorted(zip(labels, files, strict=True), key=itemgetter(0)):
        catalogue.add(0, 0, size, label, name)
    found = f"{plural(len(classes), 'class folder')} in {root}"
    notes = (
        found if classes else f"{plural(len(files), 'image')} without labels{why}",
        note_elsewhere(below, num_elsewhere),
        hint,
        f"all images have one label: if the folders in {root / classes[0]} are the classes, convert that folder"
        if len(classes) == 1
        else "",
    )
    return Source("folders" if classes else "flat", plain_name(path), catalogue, classes, notes=notes, skipped=skipped)


def split_of(folder: str) -> str:
    """Return the split that a folder is named after: train, val, test, or ""."""
    match = SPLIT_FOLDER.fullmatch(folder.strip())
    return next((split for split in SPLIT_NAMES if match[split]), "") if match else ""


def only_of_split(folders: Iterable[str], split: str, where: str) -> str:
    """Return the folder of the split, "" when there is none. Raises ValueError when there are two."""
    ours = [name for name in folders if split_of(name) == split]
    if len(ours) > 1:
        raise ValueError(f"{where}: {' and '.join(ours)} are both named after the {split} split: convert one of them")
    return ours[0] if ours else ""


def folder_of_split(names: list[str], split: str, where: str) -> str:
    """Return `a/images/train/`, of the split or beside masks, "" for all images. Raises ValueError where that is not clear."""
    below, chosen = "", False
    while True:
        common = common_folder(names)
        first = min(names, default="")
        on_the_way = first[len(below) : common].split("/")[:-1]
        inside = sorted({first_folder(name[common:]) for name in names})
        for depth, folders in enumerate([*([part] for part in on_the_way), inside]):
            above = first[: len(below) + sum(len(part) + 1 for part in on_the_way[:depth])]
            ours = "" if chosen else _choose_split(folders, names, above, split, where)
            if chosen and depth == 0 and len(folders) == 1 and split_of(folders[0]) == split:
                ours = folders[0]  # the same split again, as some archives unpack
            if inner := ours or main_folder(folders):
                break
        else:
            return below
        below, chosen = f"{above}{inner}/", chosen or bool(ours)
        names = [name for name in names if name.startswith(below)]


def _choose_split(folders: list[str], names: list[str], below: str, split: str, where: str) -> str:
    """Return the folder of the split, "" when none of the folders is named after a split; "" is for images outside of folders."""
    splits, others = ([name for name in folders if bool(split_of(name)) == is_split] for is_split in (True, False))
    ours = only_of_split(splits, split, where)
    if splits and not ours and not others:
        raise NoSplitError(
            f"{where}: no {split} images: the folders in it are {truncate_list(splits)}. Choose another --split, or convert "
            f"the folder that is to be the {split} split, such as {splits[0]}"
        )
    prefix = f"{below}{ours}/"
    has_folders = ours and any("/" in name[len(prefix) :] for name in names if name.startswith(prefix))
    if splits and others and not has_folders:  # a split with folders in it is no class
        neighbours = truncate_list([other or "images" for other in others])
        raise ValueError(
            f"{where}: the folder {ours or splits[0]} is named after a split and lies next to {neighbours}: convert the folder "
            "of one split, or rename it if it is a class"
        )
    return ours


def note_elsewhere(below: str, number: int) -> str:
    return f"images below {below}; {number:,} elsewhere, of other splits or masks, are left out" if number else ""


def class_folders(names: list[str], start: int, where: str) -> tuple[list[str], str]:
    """Return each image's class, the folder behind `name[:start]`, or [] and the reason. Raises ValueError for splits inside."""
    folders = [first_folder(name[start:]) for name in names]
    if num_loose := folders.count(""):
        why = f": {num_loose:,} lie next to the folders, so the folders are not classes"
        return [], why if num_loose < len(names) else ""
    if are_no_classes(set(folders)):
        return [], f": the folders {truncate_list(sorted(set(folders)))} are not classes"
    inner = [first_folder(name[start:].partition("/")[2]) for name in names]
    if all(len(outer) == 1 and name[:1].lower() == outer.lower() for outer, name in zip(folders, inner, strict=True)):
        return inner, ""  # folders below their initials, like `a/abbey` in Places and SUN
    for folder in sorted({name[start:].rpartition("/")[0] for name in names}):
        label, *parts = folder.split("/")
        if split := next(filter(split_of, parts), ""):
            raise ValueError(
                f"{where}: the class {label} holds a folder {split}, named after a split: splits are not mixed. Arrange the "
                "images as SPLIT/CLASS/IMAGE, or rename the folder if it is none"
            )
    return folders, ""


def files_of_split(files: list[Path], split: str, root: Path) -> list[Path]:
    """Return the files named, by themselves or folders below `root`, after the split; where none is, those of no split."""
    named = {file: {word.lastgroup for word in SPLIT_WORD.finditer(str(file.relative_to(root)))} for file in files}
    ours = [file for file in files if split in named[file]]
    return ours or [file for file in files if not named[file]]


def plain_name(path: Path) -> str:
    """Return a name of letters, digits and dashes for the shards of a source."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "images"
