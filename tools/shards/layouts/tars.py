"""Tars of images from any writer: one tar or a folder of tars, WebDatasets, tars of class folders, tars of tars.

One rule gives the labels. They come from `cls` or `json` members (WebDataset), where samples have them; else from the stem of
the inner tar, where images lie in tars inside the tar; else from the folder directly below the deepest folder that holds all
images; else there are none.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.manifest import Manifest, read_manifest
from pipeline.shards.samples import ORPHANS, Label, describe_left_out, match_labels
from pipeline.shards.side_folders import common_folder
from pipeline.shards.tar import TarMember, is_hidden, sample_key, tar_kind, tar_members
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Catalogue, FileRanges, Source, check_class_names
from tools.shards.formats import QUIET, describe_file, file_kind, is_image
from tools.shards.labels import class_order, number_labels
from tools.shards.layouts.folders import (
    class_folders,
    files_of_split,
    folder_of_split,
    has_images,
    note_elsewhere,
    only_of_split,
    plain_name,
    walk_images,
)  # fmt: skip
from tools.shards.layouts.imagenet import ARCHIVES, are_wnids, label_order


@dataclass
class Listing:
    """Images of tars: labels, names of the tars inside tars that hold them ("" for none), and what `match_labels` left out."""

    catalogue: Catalogue
    labels: list[Label] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def open_tars(path: Path, split: str, spools: Path) -> Source | None:
    tars, num_others = _tars_of_split(path, split)
    if not tars:
        return None
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
    if path.is_dir() and not len(listing.catalogue) and has_images(path):
        return None  # the tar holds something else and lies next to images
    # The names of all images tell whether they lie in folders of splits, or next to masks; if so, only ours stay.
    names = listing.catalogue.names
    if below := folder_of_split(names, split, str(path)):
        rows = [row for row, name in enumerate(names) if name.startswith(below)]
        listing.catalogue = listing.catalogue.subset(rows)
        listing.labels, listing.inner = [listing.labels[row] for row in rows], [listing.inner[row] for row in rows]
    name, classes, note = _label_images(listing, tars, plain_name(path.with_suffix("") if path.is_file() else path))
    beside, skipped = 0, listing.skipped
    if path.is_dir():
        beside = sum(1 for _ in walk_images(tars[0].parent, "", skipped))
        skipped[".tar"] -= sum(not is_hidden(tar.name) for tar in tars[0].parent.glob("*.tar"))
    notes = (
        tars[0].name if len(tars) == 1 else f"{len(tars)} tars",
        note,
        describe_left_out(listing.left_out),
        note_elsewhere(below, len(names) - len(listing.catalogue)),
        f"not of the {split} split and left out: {plural(num_others, 'tar')}" if num_others else "",
        f"left out next to the tars: {plural(beside, 'image')}; --layout folders or flat takes those" if beside else "",
    )
    return Source("tars", name, listing.catalogue, classes, notes=notes, skipped=skipped)


def _tars_of_split(path: Path, split: str) -> tuple[list[Path], int]:
    """Return one tar, or the tars of a split in a folder; and the number of other tars."""
    if path.is_file():
        return ([path] if tar_kind(path) == "a tar" else []), 0
    folders = sorted(item.name for item in path.iterdir() if item.is_dir() and not is_hidden(item.name))
    root = path / only_of_split(folders, split, str(path))
    tars = sorted(tar for tar in root.glob("*.tar") if not tar.name.startswith("."))
    chosen = [tar for tar in tars if tar.name == ARCHIVES.get(split)] or files_of_split(tars, split, root)
    return chosen, len(tars) - len(chosen)


def _list_members(listing: Listing, container: int, tar: Path, inner: TarMember | None = None) -> list[TarMember]:
    """Add the images and labels of a tar, or of the tar `inner` inside it; returns the tars in it."""
    stem, span = (sample_key(inner.name)[0], (inner.offset, inner.offset + inner.size)) if inner else ("", ())
    members, images, tars = tar_members(tar, *span), list[TarMember](), list[TarMember]()
    visible = [member for member in members if not is_hidden(member.name)]
    listing.skipped[QUIET] += len(members) - len(visible)
    for member in visible:
        if sample_key(member.name)[1] == "tar":
            tars.append(member)
        elif is_image(member.name):
            images.append(member)
        else:
            listing.skipped[file_kind(member.name)] += 1
    samples, left_out = match_labels(tar, images, visible)
    for kind, names in left_out.items():
        listing.left_out[kind] += names
    for image, label in samples:
        listing.catalogue.add(container, image.offset, image.size, UNLABELLED, f"{stem}/{image.name}" if inner else image.name)
        listing.inner.append(stem)
        listing.labels.append(label)
    return tars


def _label_images(listing: Listing, tars: list[Path], name: str) -> tuple[str, tuple[str, ...], str]:
    """Label the images by the rule above; returns the name of the set, its classes, and a note on how that was done."""
    where, names, known = str(tars[0]), listing.catalogue.names, tuple[str, ...]()
    labels: Sequence[Label] = listing.labels
    order: Callable[[Iterable[str]], list[str]] = class_order
    total, num_unlabelled = len(labels), labels.count(UNLABELLED)
    manifest = read_manifest(tars[0].parent) or Manifest()  # of shards of our own
    stems = [stem.rpartition("/")[2] for stem in dict.fromkeys(filter(None, listing.inner))]
    note = f"{plural(total, 'image')} without labels"
    if num_unlabelled < total:
        missing = f"; {num_unlabelled:,} of {total:,} images have none" if num_unlabelled else ""
        note = f"labels from cls or json members{missing}"
        if not any(isinstance(label, str) for label in labels):
            name, known = manifest.name or name, manifest.classes
    elif listing.left_out[ORPHANS]:
        pass  # labels are meant, and not the names of tars or folders
    elif len(stems) > 1 or are_wnids(stems):
        check_class_names(stems, where)
        if are_wnids(stems):
            name, order = "imagenet", label_order
        labels = [stem.rpartition("/")[2] or UNLABELLED for stem in listing.inner]
        note = f"{len(stems):,} classes named by the tars in it: {truncate_list(sorted(stems))}"
        if num_loose := labels.count(UNLABELLED):
            note += f"; {num_loose:,} images next to those have no label"
    else:
        folders, why = class_folders(names, common_folder(names), where)
        if folders:
            labels, classes = folders, class_order(set(folders))
            note = f"{len(classes):,} classes named by the folders in it: {truncate_list(classes)}"
        else:
            name, note = manifest.name or name, note + why
            if len(tars) > 1 and not all(tar.stem[-1:].isdigit() for tar in tars):
                note += "; if each tar is a class, run `tar -cf all.tar *.tar` and convert all.tar"
    numbers, found = number_labels(labels, order)
    listing.catalogue.label = array("i", numbers)
    return name, found or known, note
