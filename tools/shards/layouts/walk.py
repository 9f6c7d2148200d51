"""Images that are files of their own: find and count them."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.shards.tar import is_hidden
from tools.shards.catalogue import Catalogue
from tools.shards.file_kinds import is_image, kind
from tools.shards.layouts.splits import one_of_split, split_of, visible_folders

MOST_NAMES = 5
# Folders of images and of what belongs to them, as in detection and segmentation data: no classes.
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "jpegs", "photos", "pictures", "rgb"})
SIDE_FOLDERS = frozenset(
    ("labels", "label", "annotations", "annotation", "masks", "mask", "groundtruth", "ground_truth", "gt", "segmentation",
     "segmentationclass", "segmentationobject", "trimaps", "bbox", "boxes", "imagesets")
)  # fmt: skip


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
            elif deep and not is_hidden(entry.name):
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


def has_images(folder: Path, deep: bool = True) -> bool:
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders += [] if entry.is_symlink() or is_hidden(entry.name) else [entry.path]
            elif is_image(entry.name) and not entry.name.startswith(".") and entry.is_file():
                return True
    return deep and any(has_images(Path(path)) for path in folders)


def image_folders(root: Path) -> list[str]:
    """The folders in `root` with images at any depth."""
    return [name for name in visible_folders(root) if has_images(root / name)]


def image_root(path: Path, split: str) -> Path | None:
    """The folder whose folders are the classes of a split: `path` itself, or one below it named after the split or `images`.

    None for a file. Raises ValueError where splits would be mixed, or where it is not clear whether a folder is a class.
    """
    if not path.is_dir():
        return None
    root, chosen = path, False
    while deeper := _step(root, split, chosen):
        root, chosen = root / deeper, chosen or split_of(deeper) == split
    return root


def _step(root: Path, split: str, chosen: bool) -> str:
    """The folder in `root` to go on with, or ""."""
    folders = image_folders(root)
    splits = [name for name in folders if split_of(name)]
    if not chosen and splits:
        return _split_folder(root, folders, splits, split)
    if not folders or has_images(root, deep=False):
        return ""
    images = [name for name in folders if name.lower() in IMAGE_FOLDERS]
    if len(images) == 1 and all(name in images or name.lower() in SIDE_FOLDERS for name in folders):
        return images[0]
    if len(folders) > 1:
        return ""
    # One folder: of the same split once more, or one around folders of splits, as many archives unpack.
    inside = [] if chosen else [name for name in image_folders(root / folders[0]) if split_of(name)]
    return folders[0] if inside or (chosen and split_of(folders[0]) == split) else ""


def _split_folder(root: Path, folders: list[str], splits: list[str], split: str) -> str:
    ours, others = one_of_split(splits, split, str(root)), [name for name in folders if name not in splits]
    if not ours and not others:
        raise ValueError(
            f"{root}: no {split} images: the folders in it are {some(splits)}. Choose another --split, or give the folder "
            f"that is to be the {split} split, such as {root / splits[0]}"
        )
    if not ours or (others and not image_folders(root / ours)):
        raise ValueError(
            f"{root}: the folder {ours or splits[0]} is named after a split and lies beside {some(others)}: give the folder "
            "of one split, or rename it if it is a class"
        )
    return ours


def notes_beside_split(path: Path, root: Path) -> list[str]:
    """What lies in `path` beside the way to `root` and belongs to no split."""
    notes = []
    while root != path:
        beside = [name for name in image_folders(root.parent) if name != root.name and not split_of(name)]
        images = count_images(root.parent, Counter())
        parts = [f"the folders {some(beside)}"] if beside else []
        parts += [f"{images:,} images"] if images else []
        if parts:
            notes.append(f"left out beside {root.name}/: {' and '.join(parts)}")
        root = root.parent
    return notes


def some(names: list[str]) -> str:
    """The first few, for a note."""
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
