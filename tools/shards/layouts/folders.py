"""Images in files of their own: a folder per class, as in torchvision's ImageFolder, or without labels."""

import os
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.tar import is_hidden
from pipeline.text import plural
from tools.shards.catalogue import Catalogue, LooseFiles, Source
from tools.shards.formats import file_kind, is_image
from tools.shards.labels import number_labels
from tools.shards.layouts.splits import class_folders, folder_of_split, note_elsewhere, plain_name


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
