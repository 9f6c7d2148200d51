"""Images that are files of their own: a folder per class, or one flat folder without labels."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.index import UNLABELLED
from tools.catalogue import Catalogue, LooseFiles, Source, check_class_names

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def find_folders(path: Path, split: str) -> str:
    root = split_root(path, split)
    return f"class folders in {root}" if root and any(has_images(root / name) for name in subfolders(root)) else ""


def open_folders(path: Path, split: str, work: Path | None) -> Source:
    """ImageFolder: labels in sorted order of the folders' names; images at any depth below."""
    root = split_root(path, split)
    assert root is not None
    classes = subfolders(root)
    check_class_names(classes, str(root))
    catalogue = Catalogue([LooseFiles(root)])
    for label, name in enumerate(classes):
        add_images(catalogue, 0, root, name, label)
    return Source(
        "folders", plain_name(path), catalogue, tuple(classes), notes=(f"{len(classes)} class folders in {root}",)
    )


def find_flat(path: Path, split: str) -> str:
    root = split_root(path, split)
    return f"images in {root}" if root and has_images(root) else ""


def open_flat(path: Path, split: str, work: Path | None) -> Source:
    root = split_root(path, split)
    assert root is not None
    catalogue = Catalogue([LooseFiles(root)])
    add_images(catalogue, 0, root, "", UNLABELLED)
    return Source("flat", plain_name(path), catalogue, notes=(f"one flat folder without labels: {root}",))


def split_root(path: Path, split: str) -> Path | None:
    """`path/train` or `path/val` where there is one, else the path itself, if it is a folder."""
    for name in (split, {"val": "validation"}.get(split, split)):
        if (path / name).is_dir():
            return path / name
    return path if path.is_dir() else None


def subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def has_images(folder: Path) -> bool:
    return next(walk_images(folder, ""), None) is not None


def add_images(catalogue: Catalogue, container: int, root: Path, below: str, label: int) -> None:
    for name, size in walk_images(root, below):
        catalogue.add(container, 0, size, label, name)


def walk_images(root: Path, below: str) -> Iterator[tuple[str, int]]:
    """`(path relative to root, bytes)` of every image file, in an order that does not depend on the file system."""
    with os.scandir(root / below) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk_images(root, name)
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            yield name, entry.stat().st_size


def plain_name(path: Path) -> str:
    """A file name of letters, digits and dashes for the shards of a source."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "images"
