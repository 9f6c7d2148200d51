"""Images that are files of their own: a folder per class, or one flat folder without labels."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from tools.shards.catalogue import Catalogue, LooseFiles, Source, check_class_names
from tools.shards.file_kinds import is_image, kind

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid")}
MOST_NAMES = 5
ALL_SPLITS = ("train", "val", "validation", "valid", "test")


def find_folders(path: Path, split: str) -> str:
    root = split_root(path, split)
    return f"class folders in {root}" if root and any(has_images(root / name) for name in subfolders(root)) else ""


def images_beside_folders(path: Path, split: str) -> bool:
    """Whether images lie directly in the root: then its folders are not taken for classes unless that is asked for."""
    root = split_root(path, split)
    return root is not None and bool(count_files(root)[0])


def open_folders(path: Path, split: str, work: Path | None) -> Source:
    """ImageFolder: labels in sorted order of the folders' names; images at any depth below."""
    root = split_root(path, split)
    assert root is not None
    classes = subfolders(root)
    check_class_names(classes, str(root))
    catalogue = Catalogue([LooseFiles(root)])
    beside, passed_over = count_files(root)
    for label, name in enumerate(classes):
        add_images(catalogue, 0, root, name, label, passed_over)
    notes = [f"{len(classes)} class folder{'s'[: len(classes) > 1]} in {root}"]
    used = set(catalogue.label)
    if empty := [name for label, name in enumerate(classes) if label not in used]:
        notes.append(f"without images: {some(empty)}")
    if len(classes) == 1:
        notes.append(f"all images have one label: where the folders in {root / classes[0]} are the classes, give that")
    if beside:
        notes.append(f"{beside:,} images beside the folders are left out")
    notes += notes_beside_split(path, root)
    return Source("folders", plain_name(path), catalogue, tuple(classes), notes=tuple(notes), passed_over=passed_over)


def find_flat(path: Path, split: str) -> str:
    root = split_root(path, split)
    return f"images in {root}" if root and has_images(root) else ""


def open_flat(path: Path, split: str, work: Path | None) -> Source:
    root = split_root(path, split)
    assert root is not None
    catalogue, passed_over = Catalogue([LooseFiles(root)]), Counter[str]()
    add_images(catalogue, 0, root, "", UNLABELLED, passed_over)
    beside, total = count_files(root)[0], len(catalogue)
    note = f"{total:,} images without labels"
    if 0 < beside < total:
        note += (
            f": {beside:,} lie beside the folders, so these are no classes; "
            "--layout folders takes those in folders alone"
        )
    notes = (note, *([f"below {root}"] if root != path else []), *notes_beside_split(path, root))
    return Source("flat", plain_name(path), catalogue, notes=notes, passed_over=passed_over)


def split_root(path: Path, split: str) -> Path | None:
    """`path/train` or `path/val` where there is one, else the path itself, if it is a folder."""
    for name in SPLIT_NAMES[split]:
        if (path / name).is_dir():
            return path / name
    return path if path.is_dir() else None


def notes_beside_split(path: Path, root: Path) -> list[str]:
    """What lies beside `path/train` and belongs to no split."""
    if root == path:
        return []
    folders = [name for name in subfolders(path) if name not in ALL_SPLITS and has_images(path / name)]
    images = count_files(path)[0]
    parts = [f"the folders {some(folders)}"] if folders else []
    parts += [f"{images:,} images"] if images else []
    return [f"left out beside {root.name}/: {' and '.join(parts)}"] if parts else []


def subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def count_files(root: Path) -> tuple[int, Counter[str]]:
    """How many images lie directly in a folder, and the kinds of the other files there."""
    images, others = 0, Counter[str]()
    with os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_file():
                continue
            if is_image(entry.name) and not entry.name.startswith("."):
                images += 1
            else:
                others[kind(entry.name)] += 1
    return images, others


def has_images(folder: Path) -> bool:
    return next(walk_images(folder, "", Counter()), None) is not None


def add_images(
    catalogue: Catalogue, container: int, root: Path, below: str, label: int, passed_over: Counter[str]
) -> None:
    for name, size in walk_images(root, below, passed_over):
        catalogue.add(container, 0, size, label, name)


def walk_images(root: Path, below: str, passed_over: Counter[str]) -> Iterator[tuple[str, int]]:
    """`(path relative to root, bytes)` of every image file, in an order that does not depend on the file system.

    The other files are counted in `passed_over` by their kind. Links to folders are not followed: they may lead in circles.
    """
    with os.scandir(root / below) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith("."):
                yield from walk_images(root, name, passed_over)
        elif entry.is_dir():
            passed_over["folder link(s), not followed"] += 1
        elif not entry.is_file():
            passed_over["broken link(s)"] += entry.is_symlink()
        elif is_image(entry.name) and not entry.name.startswith("."):
            yield name, entry.stat().st_size
        else:
            passed_over[kind(entry.name)] += 1


def some(names: list[str]) -> str:
    """The first few, for a note."""
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")


def plain_name(path: Path) -> str:
    """A file name of letters, digits and dashes for the shards of a source."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "images"
