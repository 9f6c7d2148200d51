"""The labels of images in tars, by one rule for all tars.

Labels come from `cls` or `json` members (WebDataset) where samples have them. Else, where images lie in tars inside the tar,
the inner tar's stem is the class. Else the folder directly below the images' common folder is. Else there are no labels.
"""

import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.manifest import read_manifest
from pipeline.shards.tar import sample_key
from tools.shards.catalogue import Catalogue, check_class_names
from tools.shards.classes import class_order
from tools.shards.layouts.imagenet import is_wnid, label_order
from tools.shards.layouts.splits import ALL_SPLITS, SPLIT_NAMES
from tools.shards.layouts.walk import some


@dataclass
class Listing:
    """The images of some tars whose names start with `below`, and what else was seen.

    `inner`: the stem of each tar in them, and the rows `[start, stop)` of its images. `elsewhere`: images not `below`.
    """

    catalogue: Catalogue
    below: str
    inner: list[tuple[str, int, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    elsewhere: int = 0


def set_labels(catalogue: Catalogue, start: int, prefix: int, labels: dict[str, int], tar: Path) -> None:
    """Label the images from row `start` on by their key. Members of one sample need not be adjacent."""
    seen = set()
    for row in range(start, len(catalogue)):
        key = sample_key(catalogue.name(row)[prefix:])[0]
        if key in labels:
            if key in seen:
                raise ValueError(f"{tar}: two images with the key {key!r}: re-key or remove one of them")
            seen.add(key)
            catalogue.label[row] = labels[key]


def label_images(found: Listing, tars: list[Path], name: str) -> tuple[str, tuple[str, ...], str]:
    """Label the images by the rule above; returns the name of the set, its classes, and a note that says how."""
    catalogue, total = found.catalogue, len(found.catalogue)
    num_labelled = total - catalogue.label.count(UNLABELLED)
    if num_labelled:
        missing = f"; {total - num_labelled:,} of {total:,} images have none" if num_labelled < total else ""
        return *_manifest(tars[0].parent, name), f"labels from cls or json members{missing}"
    stems = [inside.rpartition("/")[2] for inside, _, _ in found.inner]
    wnids = bool(stems) and all(map(is_wnid, stems))
    if len(stems) > 1 or wnids:
        return "imagenet" if wnids else name, *_label_by_inner_tar(found, stems, str(tars[0]), wnids)
    classes, note = _label_by_folder(catalogue, str(tars[0]))
    if classes:
        return name, classes, note
    if len(tars) > 1 and not all(tar.stem[-1:].isdigit() for tar in tars):
        note += "; if each tar is a class, run `tar -cf all.tar *.tar` and convert all.tar"
    return _manifest(tars[0].parent, name)[0], (), note


def _label_by_inner_tar(found: Listing, stems: list[str], where: str, wnids: bool) -> tuple[tuple[str, ...], str]:
    check_class_names(stems, where)
    classes = label_order(stems) if wnids else class_order(stems)
    labels = {stem: label for label, stem in enumerate(classes)}
    for stem, (_, start, stop) in zip(stems, found.inner, strict=True):
        found.catalogue.label[start:stop] = array("i", [labels[stem]]) * (stop - start)
    beside = found.catalogue.label.count(UNLABELLED)
    note = f"{len(stems):,} classes named by the tars in it: {some(sorted(stems))}"
    return tuple(classes), note + (f"; {beside:,} images beside those have no label" if beside else "")


def _label_by_folder(catalogue: Catalogue, where: str) -> tuple[tuple[str, ...], str]:
    common, total = len(common_folder(catalogue)), len(catalogue)
    folders = Counter(catalogue.name(row)[common:].rpartition("/")[0].partition("/")[0] for row in range(total))
    if beside := folders[""]:
        why = f": {beside:,} lie beside the folders, so the folders are not classes" if beside < total else ""
        return (), f"{total:,} images without labels{why}"
    classes = class_order(folders.keys() - {""})
    check_class_names(classes, where)
    labels = {name: label for label, name in enumerate(classes)}
    for row in range(total):
        catalogue.label[row] = labels[catalogue.name(row)[common:].partition("/")[0]]
    return tuple(classes), f"{len(classes):,} classes named by the folders in it: {some(classes)}"


def common_folder(catalogue: Catalogue) -> str:
    """The deepest folder that every image lies in, as `a/b/` or ""."""
    rows = range(len(catalogue))
    first, last = (extreme(map(catalogue.name, rows), default="") for extreme in (min, max))
    common = os.path.commonprefix([first, last])  # noqa: RUF071  (of the first and last in order, thus of all)
    return common[: common.rfind("/") + 1]


def split_folder(catalogue: Catalogue, split: str, where: str) -> str:
    """`a/b/train/` where the images lie in folders of that name and others named after splits, else ""."""
    common, folders = common_folder(catalogue), set()
    for row in range(len(catalogue)):
        folder, slash, _ = catalogue.name(row)[len(common) :].partition("/")
        if not slash or folder not in ALL_SPLITS:
            return ""
        folders.add(folder)
    ours = [name for name in SPLIT_NAMES[split] if name in folders]
    if folders and not ours:
        names = ", ".join(sorted(folders))
        raise ValueError(f"{where}: no {split} images: the folders in it are {names}. Choose another --split")
    return f"{common}{ours[0]}/" if ours else ""


def _manifest(folder: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Name and classes as one of our own manifests gives them. ValueError for a damaged one."""
    manifest = read_manifest(folder)
    return (manifest.name or name, manifest.classes) if manifest else (name, ())
