"""Images that are files of their own: find and count them."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tools.shards.catalogue import Catalogue
from tools.shards.file_kinds import is_image, kind
from tools.shards.layouts.splits import ALL_SPLITS

MOST_NAMES = 5


def subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def walk_images(root: Path, below: str, skipped: Counter[str], deep: bool = True) -> Iterator[tuple[str, int]]:
    """`(path relative to root, bytes)` of every image file, in an order that does not depend on the file system.

    Other files are counted in `skipped` by kind. Links to folders are not followed: they may form loops. Without `deep`,
    folders are ignored.
    """
    with os.scandir(root / below) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            if deep and entry.is_symlink():
                skipped["folder link(s), not followed"] += 1
            elif deep and not entry.name.startswith("."):
                yield from walk_images(root, name, skipped)
        elif not entry.is_file():
            skipped["broken link(s)"] += entry.is_symlink()
        elif is_image(entry.name) and not entry.name.startswith("."):
            yield name, entry.stat().st_size
        else:
            skipped[kind(entry.name)] += 1


def add_images(catalogue: Catalogue, root: Path, below: str, label: int, skipped: Counter[str]) -> None:
    """Add the images below `root/below` to the catalogue's first container."""
    for name, size in walk_images(root, below, skipped):
        catalogue.add(0, 0, size, label, name)


def count_images(root: Path, skipped: Counter[str]) -> int:
    """How many images lie directly in a folder."""
    return sum(1 for _ in walk_images(root, "", skipped, deep=False))


def has_images(folder: Path) -> bool:
    return next(walk_images(folder, "", Counter()), None) is not None


def notes_beside_split(path: Path, root: Path) -> list[str]:
    """What lies beside `path/train` and belongs to no split."""
    if root == path:
        return []
    folders = [name for name in subfolders(path) if name not in ALL_SPLITS and has_images(path / name)]
    images = count_images(path, Counter())
    parts = [f"the folders {some(folders)}"] if folders else []
    parts += [f"{images:,} images"] if images else []
    return [f"left out beside {root.name}/: {' and '.join(parts)}"] if parts else []


def some(names: list[str]) -> str:
    """The first few, for a note."""
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
