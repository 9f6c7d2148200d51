"""Images in files of their own: a folder per class, as in torchvision's ImageFolder, or without labels."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED
from pipeline.shards.tar import is_hidden
from pipeline.text import plural
from tools.shards.catalogue import Catalogue, LooseFiles, Source
from tools.shards.images import is_image
from tools.shards.labels import number_labels
from tools.shards.layouts.splits import class_folders, folder_of_split, note_elsewhere, plain_name
from tools.shards.skipped_files import file_kind


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
    notes, root = note_elsewhere(below, len(listed) - len(files)), path / below
    if labelled and (num_loose := sum("/" not in name for name, _ in files)):
        files = [(name, size) for name, size in files if "/" in name]
        notes.append(f"left out next to the folders: {plural(num_loose, 'image')}")
    if not files:
        return None
    folders, why = ([], "") if labelled is False else class_folders([name for name, _ in files], 0, str(root))
    labels, classes = number_labels(folders or [UNLABELLED] * len(files))
    catalogue = Catalogue([LooseFiles(root)])
    for row in np.argsort(labels, kind="stable").tolist():
        catalogue.add(0, 0, files[row][1], labels[row], files[row][0])
    note = (
        f"{plural(len(classes), 'class folder')} in {root}" if classes else f"{plural(len(files), 'image')} without labels{why}"
    )
    if len(classes) == 1:
        inner = root / classes[0]
        notes.append(f"all images have one label: if the folders in {inner} are the classes, convert that folder")
    elif any("/" in name for name, _ in files) and not all("/" in name for name, _ in files):
        notes.append("--layout folders takes only the images in folders")
    layout = "folders" if classes else "flat"
    return Source(layout, plain_name(path), catalogue, classes, notes=(note, *notes), skipped=skipped)
