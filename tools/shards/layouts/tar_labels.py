"""The labels of images in tars, by one rule for all tars.

Labels come from `cls` or `json` members (WebDataset) where samples have them. Else, where images lie in tars inside the tar,
the inner tar's stem is the class. Else the folder directly below the images' common folder is. Else there are no labels.
"""

import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED
from pipeline.shards.manifest import read_manifest
from pipeline.shards.samples import LabelMembers, match_labels, orphan_note
from pipeline.shards.tar import TarMember
from tools.shards.catalogue import Catalogue, check_class_names
from tools.shards.classes import class_order
from tools.shards.layouts.imagenet import is_wnid, label_order
from tools.shards.layouts.splits import check_no_splits, one_of_split, split_of
from tools.shards.layouts.walk import IMAGE_FOLDERS, SIDE_FOLDERS, some

FIRST_TEXT = UNLABELLED - 1


@dataclass
class Listing:
    """The images of some tars whose names start with `below`, and what else was seen.

    `inner`: the stem of each tar in them, and the rows `[start, stop)` of its images. `elsewhere`: images not `below`.
    `orphans`: labels of no image. `parts`: further images of samples, left out. `texts`: labels that are names of classes.
    """

    catalogue: Catalogue
    below: str
    inner: list[tuple[str, int, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    elsewhere: int = 0
    orphans: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What is left out of the samples."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.parts.most_common())
        return [
            *([f"further images of the samples are left out: {kinds}"] if kinds else []),
            *([orphan_note(self.orphans)] if self.orphans else []),
        ]


def add_sample_images(
    found: Listing, container: int, tar: Path, prefix: str, images: list[TarMember], labels: LabelMembers
) -> None:
    """Add the images of one tar with their labels. A label that is text is stored as -2, -3, ... until all are known."""
    matches = match_labels([member.name for member in images], labels.by_key(), tar)
    found.orphans += len(matches.orphans)
    for number, (member, label) in enumerate(zip(images, matches.labels, strict=True)):
        if number in matches.parts:
            found.parts[member.name.rpartition("/")[2].partition(".")[2]] += 1
            continue
        if isinstance(label, str):
            label = FIRST_TEXT - found.texts.setdefault(label, len(found.texts))
        stored = UNLABELLED if label is None else label
        found.catalogue.add(container, member.offset, member.size, stored, prefix + plain(member.name))


def plain(name: str) -> str:
    """A member's name without `./`: a tar may hold both forms, and the folder "." is no class."""
    return name.removeprefix("./")


def label_images(found: Listing, tars: list[Path], name: str) -> tuple[str, tuple[str, ...], str]:
    """Label the images by the rule above; returns the name of the set, its classes, and a note that says how."""
    catalogue, total = found.catalogue, len(found.catalogue)
    num_labelled = total - catalogue.label.count(UNLABELLED)
    if num_labelled:
        named = _number_texts(found, str(tars[0])) if found.texts else ()
        missing = f"; {total - num_labelled:,} of {total:,} images have none" if num_labelled < total else ""
        note = f"labels from cls or json members{missing}"
        return (name, named, note) if named else (*_manifest(tars[0].parent, name), note)
    if found.orphans:
        return name, (), f"{total:,} images without labels"
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


def _number_texts(found: Listing, where: str) -> tuple[str, ...]:
    """Labels that are names become numbers in the order of the names."""
    labels = np.asarray(found.catalogue.label)
    if (numbers := labels[labels >= 0]).size:
        text = next(iter(found.texts))
        raise ValueError(
            f"{where}: labels are numbers ({numbers[0]}) as well as names ({text!r}): use one of them for all"
        )
    classes = class_order(found.texts)
    check_class_names(classes, where)
    new = np.empty(len(classes), np.int32)
    new[[found.texts[name] for name in classes]] = np.arange(len(classes))
    is_text = labels <= FIRST_TEXT
    found.catalogue.label = array(
        "i", np.where(is_text, new[np.where(is_text, FIRST_TEXT - labels, 0)], labels).tolist()
    )
    return tuple(classes)


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
    if all(name.lower() in IMAGE_FOLDERS | SIDE_FOLDERS for name in classes):
        return (), f"{total:,} images without labels: the folders {some(classes)} are not classes"
    check_class_names(classes, where)
    check_no_splits(map(catalogue.name, range(total)), common, where)
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
    """`a/b/train/` where the images lie in folders named after splits, "" where none is. Raises ValueError for a mixture."""
    common, folders = common_folder(catalogue), set()
    for row in range(len(catalogue)):
        folder, slash, _ = catalogue.name(row)[len(common) :].partition("/")
        folders.add(folder if slash else "")
    splits, others = (
        sorted(name for name in folders if bool(split_of(name)) == is_split) for is_split in (True, False)
    )
    if not splits:
        return ""
    ours = one_of_split(splits, split, where)
    if not ours and not others:
        names = ", ".join(splits)
        raise ValueError(f"{where}: no {split} images: the folders in it are {names}. Choose another --split")
    if others:
        raise ValueError(
            f"{where}: the folder {ours or splits[0]} in it is named after a split and lies beside "
            f"{some([name or 'images' for name in others])}: unpack the folder of one split, or rename it if it is a class"
        )
    return f"{common}{ours}/"


def _manifest(folder: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Name and classes as one of our own manifests gives them. ValueError for a damaged one."""
    manifest = read_manifest(folder)
    return (manifest.name or name, manifest.classes) if manifest else (name, ())
