"""A folder per class, as in torchvision's ImageFolder."""

from collections import Counter
from pathlib import Path

from tools.shards.catalogue import Catalogue, LooseFiles, Source, check_class_names
from tools.shards.classes import class_order
from tools.shards.layouts.splits import check_no_splits, plain_name, visible_folders
from tools.shards.layouts.walk import (
    IMAGE_FOLDERS,
    SIDE_FOLDERS,
    add_images,
    count_images,
    has_images,
    image_folders,
    image_root,
    notes_beside_split,
    some,
)


def open_folders(path: Path, split: str, spools: Path | None) -> Source | None:
    """Labels in the order of the folders' names, integers as numbers; images at any depth below."""
    root = image_root(path, split)
    if root is None or not image_folders(root):
        return None
    classes = class_order(visible_folders(root))
    check_class_names(classes, str(root))
    catalogue, skipped = Catalogue([LooseFiles(root)]), Counter[str]()
    beside = count_images(root, skipped)
    for label, name in enumerate(classes):
        add_images(catalogue, root, name, label, skipped)
    check_no_splits((catalogue.name(row) for row in range(len(catalogue))), 0, str(root))
    notes = [f"{len(classes)} class folder{'s'[: len(classes) > 1]} in {root}"]
    used = set(catalogue.label)
    if empty := [name for label, name in enumerate(classes) if label not in used]:
        notes.append(f"without images: {some(empty)}")
    if len(classes) == 1:
        inner = root / classes[0]
        notes.append(f"all images have one label: if the folders in {inner} are the classes, convert that folder")
    if beside:
        notes.append(f"{beside:,} images beside the folders are left out")
    notes += notes_beside_split(path, root)
    return Source("folders", plain_name(path), catalogue, tuple(classes), notes=tuple(notes), skipped=skipped)


def folders_are_classes(path: Path, split: str) -> bool:
    """Not where images lie beside them, or where all are called `images`, `masks` and so on: then only if that is requested."""
    root = image_root(path, split)
    if root is None or has_images(root, deep=False):
        return False
    return not {name.lower() for name in image_folders(root)} <= IMAGE_FOLDERS | SIDE_FOLDERS
