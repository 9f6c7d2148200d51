"""Images in files of their own: a folder per class, as in torchvision's ImageFolder, or without labels."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.side_folders import are_no_classes, main_folder
from pipeline.shards.tar import is_hidden
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, LooseFiles, Source
from tools.shards.classes import class_order
from tools.shards.images import is_image
from tools.shards.layouts.splits import check_no_splits, choose_split, mixed_splits, plain_name, split_of, visible_folders
from tools.shards.skipped_files import file_kind


def are_below_initials(folders: Collection[tuple[str, str]]) -> bool:
    """Return True for folders like (a, abbey), (b, bakery): the inner ones are the classes, as in Places and SUN."""
    return bool(folders) and all(len(outer) == 1 and inner[:1].lower() == outer.lower() for outer, inner in folders)


def walk_images(root: Path, below: str, skipped: Counter[str], deep: bool = True) -> Iterator[tuple[str, int]]:
    """Yield `(path relative to root, bytes)` of every image file, in an order that does not depend on the file system.

    Counts other files in `skipped` by kind. Links to folders are not followed, because they can form loops. Without `deep`,
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
            skipped[file_kind(entry.name)] += 1


def add_images(catalogue: Catalogue, root: Path, below: str, label: int, skipped: Counter[str]) -> None:
    """Add the images below `root/below` to the first container of the catalogue."""
    for name, size in walk_images(root, below, skipped):
        catalogue.add(0, 0, size, label, name)


def count_images(folder: Path, skipped: Counter[str]) -> int:
    """Return the number of images directly in a folder."""
    return sum(1 for _ in walk_images(folder, "", skipped, deep=False))


def has_images(folder: Path, deep: bool = True) -> bool:
    """Return True at the first image, without listing the folder to its end, which takes long on a network disk."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders += [] if entry.is_symlink() or is_hidden(entry.name) else [entry.path]
            elif is_image(entry.name) and not entry.name.startswith(".") and entry.is_file():
                return True
    return deep and any(has_images(Path(path)) for path in folders)


def image_folders(root: Path) -> list[str]:
    """Return the folders in `root` with images at any depth."""
    return [name for name in visible_folders(root) if has_images(root / name)]


def image_root(path: Path, split: str) -> Path | None:
    """Return the folder whose folders are the classes of a split: `path`, or one below it named after the split or `images`.

    None for a file. Raises ValueError where splits would be mixed, and where a folder can be a class as well as a split.
    """
    if not path.is_dir():
        return None
    root, chosen = path, False
    while inner := _inner_root(root, split, chosen):
        root, chosen = root / inner, chosen or split_of(inner) == split
    return root


def _inner_root(root: Path, split: str, chosen: bool) -> str:
    """Return the folder in `root` to descend into, or "". `chosen`: the folder of the split is reached."""
    folders = image_folders(root)
    if not chosen:
        ours, others = choose_split(folders, split, str(root))
        if ours:
            if others and not image_folders(root / ours):
                raise mixed_splits(ours, others, str(root))
            return ours
    if not folders or has_images(root, deep=False):
        return ""
    if images := main_folder(folders):
        return images
    if len(folders) > 1:
        return ""
    # A single folder: the same split again, or a parent of splits or of images and masks, as many archives unpack.
    return folders[0] if (chosen and split_of(folders[0]) == split) or _is_parent(root / folders[0], chosen) else ""


def _is_parent(root: Path, chosen: bool) -> bool:
    folders = image_folders(root)
    if len(folders) == 1 and not has_images(root, deep=False) and _is_parent(root / folders[0], chosen):
        return True
    return bool(main_folder(folders)) or (not chosen and any(map(split_of, folders)))


def notes_on_siblings(path: Path, root: Path) -> list[str]:
    """Describe the images that lie between `path` and `root`, next to the folders that lead there, and belong to no split."""
    notes = []
    while root != path:
        siblings = [name for name in image_folders(root.parent) if name != root.name and not split_of(name)]
        num_images = count_images(root.parent, Counter())
        parts = [f"the folders {truncate_list(siblings)}"] if siblings else []
        parts += [plural(num_images, "image")] if num_images else []
        if parts:
            notes.append(f"left out next to {root.name}/: {' and '.join(parts)}")
        root = root.parent
    return notes


def folders_are_classes(path: Path, split: str) -> bool:
    """Return False where images lie next to the folders, or where all folders are called `images`, `masks` and so on.

    Their folders are classes only on request.
    """
    root = image_root(path, split)
    return root is not None and not has_images(root, deep=False) and not are_no_classes(image_folders(root))


def _class_folders(root: Path) -> dict[str, str]:
    """Return the folder of each class below `root`."""
    outer = visible_folders(root)
    if all(len(name) == 1 for name in outer) and not any(has_images(root / name, deep=False) for name in outer):
        inner = [(initial, name) for initial in outer for name in visible_folders(root / initial)]
        if are_below_initials(inner):
            return {name: f"{initial}/{name}" for initial, name in inner}
    return {name: name for name in outer}


def open_folders(path: Path, split: str, spools: Path | None) -> Source | None:
    """Number the classes in the order of their names, integers as numbers; images lie at any depth in their folders."""
    root = image_root(path, split)
    if root is None or not image_folders(root):
        return None
    folder_of = _class_folders(root)
    classes = class_order(folder_of)
    catalogue, skipped = Catalogue([LooseFiles(root)]), Counter[str]()
    num_loose = count_images(root, skipped)
    for label, name in enumerate(classes):
        add_images(catalogue, root, folder_of[name], label, skipped)
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


def open_flat(path: Path, split: str, spools: Path | None) -> Source | None:
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
