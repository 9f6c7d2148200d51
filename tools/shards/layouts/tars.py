"""Tars of images from any writer: one tar or a folder of tars, WebDatasets, tars of class folders, tars of tars.

One rule gives the labels. They come from `cls` or `json` members (WebDataset), where samples have them; else from the stem of
the inner tar, where images lie in tars inside the tar; else from the folder directly below the deepest folder that holds all
images; else there are none.
"""

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.manifest import read_manifest
from pipeline.shards.samples import ORPHANS, Label, LabelMembers, describe_left_out, match_labels
from pipeline.shards.side_folders import common_folder
from pipeline.shards.tar import TarMember, is_hidden, sample_key, tar_kind, tar_members
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, FileRanges, Source, check_class_names
from tools.shards.classes import class_order, number_labels
from tools.shards.images import is_image
from tools.shards.layouts.folders import has_images, walk_images
from tools.shards.layouts.imagenet import ARCHIVES, are_wnids, label_order
from tools.shards.layouts.splits import (
    class_folders,
    files_of_split,
    folder_of_split,
    note_elsewhere,
    only_of_split,
    plain_name,
    visible_folders,
)
from tools.shards.skipped_files import QUIET, describe_file, file_kind


@dataclass
class Listing:
    """The images of some tars.

    `labels` and `inner`: of each image, its label and the name of the tar inside the tar that it lies in, "" for none.
    `left_out`: of all tars, as from `match_labels`.
    """

    catalogue: Catalogue
    labels: list[Label] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def open_tars(path: Path, split: str, spools: Path) -> Source | None:
    tars, num_others = _tars_of_split(path, split)
    if not tars:
        return None
    listing = _list_tars(tars)
    if path.is_dir() and not len(listing.catalogue) and has_images(path):
        return None  # the tar holds something else and lies next to images
    # The names of all images tell whether they lie in folders of splits, or next to masks; if so, only ours stay.
    names = listing.catalogue.names
    if below := folder_of_split(names, split, str(path)):
        rows = [row for row, name in enumerate(names) if name.startswith(below)]
        listing.catalogue = listing.catalogue.subset(rows)
        listing.labels, listing.inner = [listing.labels[row] for row in rows], [listing.inner[row] for row in rows]
    name, classes, note = _label_images(listing, tars, plain_name(path.with_suffix("") if path.is_file() else path))
    notes = [tars[0].name if len(tars) == 1 else f"{len(tars)} tars", note]
    if left_out := describe_left_out(listing.left_out):
        notes.append(left_out)
    notes += note_elsewhere(below, len(names) - len(listing.catalogue))
    if num_others:
        notes.append(f"not of the {split} split and left out: {plural(num_others, 'tar')}")
    if path.is_dir():
        root, skipped = tars[0].parent, listing.skipped
        num_images = sum(1 for _ in walk_images(root, "", skipped))
        skipped[".tar"] -= sum(not is_hidden(tar.name) for tar in root.glob("*.tar"))
        if num_images:
            images = plural(num_images, "image")
            notes.append(f"left out next to the tars: {images}; --layout folders or flat takes those")
    return Source("tars", name, listing.catalogue, classes, notes=tuple(notes), skipped=listing.skipped)


def _tars_of_split(path: Path, split: str) -> tuple[list[Path], int]:
    """Return one tar, or the tars of a split in a folder; and the number of other tars."""
    if path.is_file():
        return ([path] if tar_kind(path) == "a tar" else []), 0
    root = path / only_of_split(visible_folders(path), split, str(path))
    tars = sorted(tar for tar in root.glob("*.tar") if not tar.name.startswith("."))
    chosen = [tar for tar in tars if tar.name == ARCHIVES.get(split)] or files_of_split(tars, split, root)
    return chosen, len(tars) - len(chosen)


def _list_tars(tars: list[Path]) -> Listing:
    listing = Listing(Catalogue([FileRanges(tar) for tar in tars]))
    for container, tar in enumerate(tars):
        if what := describe_file(tar):
            raise ValueError(f"{tar}: {what}")
        for inner in _list_members(listing, container, tar):
            if deeper := _list_members(listing, container, tar, inner):
                raise ValueError(
                    f"{tar}: {inner.name} contains a tar itself ({deeper[0].name}), and tars in tars are read one level "
                    f"deep: unpack {tar.name} and convert its content"
                )
    return listing


def _list_members(listing: Listing, container: int, tar: Path, inner: TarMember | None = None) -> list[TarMember]:
    """Add the images and labels of a tar, or of the tar `inner` inside it; returns the tars in it."""
    stem = sample_key(inner.name)[0] if inner else ""
    start, stop = (inner.offset, inner.offset + inner.size) if inner else (0, None)
    images: list[TarMember] = []
    labels, tars = LabelMembers(tar), []
    for member in tar_members(tar, start, stop):
        if is_hidden(member.name):
            listing.skipped[QUIET] += 1
        elif sample_key(member.name)[1] == "tar":
            tars.append(member)
        elif not is_image(member.name):
            labels.add(member)
            listing.skipped[file_kind(member.name)] += 1
        else:
            images.append(member)
    matches = match_labels([member.name for member in images], labels, tar)
    for kind, left_out in matches.left_out.items():
        listing.left_out[kind] += left_out
    for number, (member, label) in enumerate(zip(images, matches.labels, strict=True)):
        if number not in matches.parts:
            name = f"{stem}/{member.name}" if inner else member.name
            listing.catalogue.add(container, member.offset, member.size, UNLABELLED, name)
            listing.inner.append(stem)
            listing.labels.append(UNLABELLED if label is None else label)
    return tars


def _label_images(listing: Listing, tars: list[Path], name: str) -> tuple[str, tuple[str, ...], str]:
    """Label the images by the rule above; returns the name of the set, its classes, and a note on how that was done."""
    where, total, num_unlabelled = str(tars[0]), len(listing.labels), listing.labels.count(UNLABELLED)
    unlabelled = f"{plural(total, 'image')} without labels"
    manifest = read_manifest(tars[0].parent)  # one of our own
    own_name = manifest.name if manifest and manifest.name else name
    if num_unlabelled < total:
        labels, classes = number_labels(listing.labels)
        listing.catalogue.label = array("i", labels)
        missing = f"; {num_unlabelled:,} of {total:,} images have none" if num_unlabelled else ""
        note = f"labels from cls or json members{missing}"
        return (name, classes, note) if classes else (own_name, tuple(manifest.classes) if manifest else (), note)
    if listing.left_out[ORPHANS]:
        return name, (), unlabelled
    stems = [stem.rpartition("/")[2] for stem in dict.fromkeys(filter(None, listing.inner))]
    if len(stems) > 1 or are_wnids(stems):
        return "imagenet" if are_wnids(stems) else name, *_label_by_inner_tar(listing, stems, where)
    names = listing.catalogue.names
    folders, why = class_folders(names, common_folder(names), where)
    if folders:
        labels, classes = number_labels(folders)
        listing.catalogue.label = array("i", labels)
        return name, classes, f"{len(classes):,} classes named by the folders in it: {truncate_list(classes)}"
    note = unlabelled + why
    if len(tars) > 1 and not all(tar.stem[-1:].isdigit() for tar in tars):
        note += "; if each tar is a class, run `tar -cf all.tar *.tar` and convert all.tar"
    return own_name, (), note


def _label_by_inner_tar(listing: Listing, stems: list[str], where: str) -> tuple[tuple[str, ...], str]:
    """Label the images by the tar that they lie in; returns the classes and a note."""
    check_class_names(stems, where)
    classes = label_order(stems) if are_wnids(stems) else class_order(stems)
    labels = {stem: label for label, stem in enumerate(classes)}
    listing.catalogue.label = array("i", (labels.get(stem.rpartition("/")[2], UNLABELLED) for stem in listing.inner))
    num_loose = listing.catalogue.label.count(UNLABELLED)
    note = f"{len(stems):,} classes named by the tars in it: {truncate_list(sorted(stems))}"
    return tuple(classes), note + (f"; {num_loose:,} images next to those have no label" if num_loose else "")
