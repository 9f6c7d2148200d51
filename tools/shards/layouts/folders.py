"""Images in files of their own: a folder per class, as in torchvision's ImageFolder, or without labels."""

from collections import Counter
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, LooseFiles, Source, check_class_names
from tools.shards.classes import class_order
from tools.shards.layouts.splits import check_no_splits, plain_name, visible_folders
from tools.shards.layouts.walk import (
    add_images,
    are_no_classes,
    count_images,
    has_images,
    image_folders,
    image_root,
    notes_on_siblings,
)


def folders_are_classes(path: Path, split: str) -> bool:
    """Return False where images lie next to the folders, or where all folders are called `images`, `masks` and so on.

    Their folders are classes only on request.
    """
    root = image_root(path, split)
    return root is not None and not has_images(root, deep=False) and not are_no_classes(image_folders(root))


def open_folders(path: Path, split: str, spool: Path | None) -> Source | None:
    """Number the folders in the order of their names, integers as numbers; images lie at any depth in them."""
    root = image_root(path, split)
    if root is None or not image_folders(root):
        return None
    classes = class_order(visible_folders(root))
    check_class_names(classes, str(root))
    catalogue, skipped = Catalogue([LooseFiles(root)]), Counter[str]()
    num_loose = count_images(root, skipped)
    for label, name in enumerate(classes):
        add_images(catalogue, root, name, label, skipped)
    check_no_splits(catalogue.names(), 0, str(root))
    notes, used = [f"{plural(len(classes), 'class folder')} in {root}"], set(catalogue.label)
    if empty := [name for label, name in enumerate(classes) if label not in used]:
        notes.append(f"without images: {truncate_list(empty)}")
    if len(classes) == 1:
        inner = root / classes[0]
        notes.append(f"all images have one label: if the folders in {inner} are the classes, convert that folder")
    if num_loose:
        notes.append(f"left out next to the folders: {plural(num_loose, 'image')}")
    notes += notes_on_siblings(path, root)
    return Source("folders", plain_name(path), catalogue, tuple(classes), notes=tuple(notes), skipped=skipped)


def open_flat(path: Path, split: str, spool: Path | None) -> Source | None:
    """Take all images, in one folder or below it, without labels."""
    root = image_root(path, split)
    if root is None or not has_images(root):
        return None
    catalogue, skipped = Catalogue([LooseFiles(root)]), Counter[str]()
    add_images(catalogue, root, "", UNLABELLED, skipped)
    num_loose = sum("/" not in name for name in catalogue.names())
    note = f"{plural(len(catalogue), 'image')} without labels"
    if 0 < num_loose < len(catalogue):
        note += (
            f": {num_loose:,} lie next to the folders, so the folders are not classes; "
            "--layout folders takes only the images in folders"
        )
    notes = (note, *([f"below {root}"] if root != path else []), *notes_on_siblings(path, root))
    return Source("flat", plain_name(path), catalogue, notes=notes, skipped=skipped)
