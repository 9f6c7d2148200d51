"""The labels of images in tars, by one rule for all tars.

Labels come from `cls` or `json` members (WebDataset), where samples have them; else from the stem of the inner tar, where
images lie in tars inside the tar; else from the folder directly below the deepest folder that holds all images; else there
are none.
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
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, check_class_names
from tools.shards.classes import class_order
from tools.shards.layouts.imagenet import are_wnids, label_order
from tools.shards.layouts.splits import check_no_splits, choose_split, mixed_splits
from tools.shards.layouts.walk import are_no_classes

FIRST_TEXT = UNLABELLED - 1
Labelling = tuple[tuple[str, ...], str]  # the classes, and a note on how the images are labelled


@dataclass
class Listing:
    """The images of some tars whose names start with `below`.

    `inner`: the stem of each tar inside the tars, and the rows `[start, stop)` of its images. `elsewhere`: the number of
    images not `below`. `orphans`: the number of labels without an image. `parts`: further images of the samples, which are
    left out. `texts`: labels that are names of classes.
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
        """Describe what is left out of the samples."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.parts.most_common())
        notes = [f"further images of the samples are left out: {kinds}"] if kinds else []
        return [*notes, orphan_note(self.orphans)] if self.orphans else notes


def add_labelled_images(
    listing: Listing, container: int, tar: Path, prefix: str, images: list[TarMember], labels: LabelMembers
) -> None:
    """Add the images of one tar with their labels. Labels that are texts are stored as -2, -3, ... until all are known."""
    matches = match_labels([member.name for member in images], labels.by_key(), tar)
    listing.orphans += len(matches.orphans)
    for number, (member, label) in enumerate(zip(images, matches.labels, strict=True)):
        if number in matches.parts:
            listing.parts[member.name.rpartition("/")[2].partition(".")[2]] += 1
            continue
        if isinstance(label, str):
            label = FIRST_TEXT - listing.texts.setdefault(label, len(listing.texts))
        stored = UNLABELLED if label is None else label
        listing.catalogue.add(container, member.offset, member.size, stored, prefix + plain_member(member.name))


def plain_member(name: str) -> str:
    """Return a member's name without `./`: a tar can hold both forms, and the folder "." is no class."""
    return name.removeprefix("./")


def label_images(listing: Listing, tars: list[Path], name: str) -> tuple[str, tuple[str, ...], str]:
    """Label the images by the rule above; returns the name of the set, its classes, and a note on how that was done."""
    catalogue, where = listing.catalogue, str(tars[0])
    num_unlabelled = catalogue.label.count(UNLABELLED)
    unlabelled = f"{plural(len(catalogue), 'image')} without labels"
    if num_unlabelled < len(catalogue):
        missing = f"; {num_unlabelled:,} of {len(catalogue):,} images have none" if num_unlabelled else ""
        note = f"labels from cls or json members{missing}"
        if listing.texts:
            return name, _number_texts(listing, where), note
        return *_manifest(tars[0].parent, name), note
    if listing.orphans:
        return name, (), unlabelled
    stems = [stem.rpartition("/")[2] for stem, _, _ in listing.inner]
    if len(stems) > 1 or are_wnids(stems):
        return "imagenet" if are_wnids(stems) else name, *_label_by_inner_tar(listing, stems, where)
    classes, note = _label_by_folder(catalogue, where, unlabelled)
    if classes:
        return name, classes, note
    if len(tars) > 1 and not all(tar.stem[-1:].isdigit() for tar in tars):
        note += "; if each tar is a class, run `tar -cf all.tar *.tar` and convert all.tar"
    return _manifest(tars[0].parent, name)[0], (), note


def _number_texts(listing: Listing, where: str) -> tuple[str, ...]:
    """Replace labels that are names by numbers in the order of the names."""
    labels = np.asarray(listing.catalogue.label)
    if (numbers := labels[labels >= 0]).size:
        text = next(iter(listing.texts))
        raise ValueError(
            f"{where}: labels are numbers ({numbers[0]}) as well as names ({text!r}): use one of them for all"
        )
    classes = class_order(listing.texts)
    check_class_names(classes, where)
    numbered = {FIRST_TEXT - listing.texts[name]: label for label, name in enumerate(classes)}
    listing.catalogue.label = array("i", (numbered.get(label, label) for label in listing.catalogue.label))
    return tuple(classes)


def _label_by_inner_tar(listing: Listing, stems: list[str], where: str) -> Labelling:
    check_class_names(stems, where)
    classes = label_order(stems) if are_wnids(stems) else class_order(stems)
    labels = {stem: label for label, stem in enumerate(classes)}
    for stem, (_, start, stop) in zip(stems, listing.inner, strict=True):
        listing.catalogue.label[start:stop] = array("i", [labels[stem]]) * (stop - start)
    num_loose = listing.catalogue.label.count(UNLABELLED)
    note = f"{len(stems):,} classes named by the tars in it: {truncate_list(sorted(stems))}"
    return tuple(classes), note + (f"; {num_loose:,} images next to those have no label" if num_loose else "")


def _label_by_folder(catalogue: Catalogue, where: str, unlabelled: str) -> Labelling:
    names = catalogue.names()
    common = _common_folder(names)
    folders = [_first_folder(name[common:]) for name in names]
    if num_loose := folders.count(""):
        why = f": {num_loose:,} lie next to the folders, so the folders are not classes"
        return (), unlabelled + (why if num_loose < len(names) else "")
    classes = class_order(set(folders))
    if are_no_classes(classes):
        return (), f"{unlabelled}: the folders {truncate_list(classes)} are not classes"
    check_class_names(classes, where)
    check_no_splits(names, common, where)
    labels = {name: label for label, name in enumerate(classes)}
    catalogue.label = array("i", map(labels.__getitem__, folders))
    return tuple(classes), f"{len(classes):,} classes named by the folders in it: {truncate_list(classes)}"


def _common_folder(names: list[str]) -> int:
    """Return the length of the deepest folder that every image lies in, with its slash; 0 where there is none."""
    common = os.path.commonprefix([min(names, default=""), max(names, default="")])  # noqa: RUF071  (thus of all names)
    return common.rfind("/") + 1


def _first_folder(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def find_split_folder(catalogue: Catalogue, split: str, where: str) -> str:
    """Return `a/b/train/` where the images lie in folders named after splits, else "". Raises ValueError for a mixture."""
    names = catalogue.names()
    common = _common_folder(names)
    ours, others = choose_split({_first_folder(name[common:]) for name in names}, split, where)
    if ours and others:
        raise mixed_splits(ours, others, where)
    return f"{names[0][:common]}{ours}/" if ours else ""


def _manifest(folder: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Return name and classes from one of our own manifests, if there is one. Raises ValueError for a damaged one."""
    manifest = read_manifest(folder)
    return (manifest.name or name, tuple(manifest.classes)) if manifest else (name, ())
