"""A folder per class, as in torchvision's ImageFolder."""

from collections import Counter
from pathlib import Path

from tools.shards.catalogue import Catalogue, LooseFiles, Source, check_class_names
from tools.shards.classes import class_order
from tools.shards.layouts.splits import plain_name, split_root
from tools.shards.layouts.walk import (
    add_images,
    count_images,
    has_images,
    notes_beside_split,
    some,
    subfolders,
    walk_images,
)


def open_folders(path: Path, split: str, spools: Path | None) -> Source | None:
    """Labels in the order of the folders' names, integers as numbers; images at any depth below."""
    root = split_root(path, split)
    if root is None or not any(has_images(root / name) for name in subfolders(root)):
        return None
    classes = class_order(subfolders(root))
    check_class_names(classes, str(root))
    catalogue, skipped = Catalogue([LooseFiles(root)]), Counter[str]()
    beside = count_images(root, skipped)
    for label, name in enumerate(classes):
        add_images(catalogue, root, name, label, skipped)
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


def images_beside_folders(path: Path, split: str) -> bool:
    """Whether images lie directly in the root: then its folders are not taken for classes unless that is requested."""
    root = split_root(path, split)
    return root is not None and next(walk_images(root, "", Counter(), deep=False), None) is not None
