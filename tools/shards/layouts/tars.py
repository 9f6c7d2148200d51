"""Tars of images from any writer: one tar or a folder of tars, WebDatasets, tars of class folders, tars of tars."""

from pathlib import Path

from pipeline.shards.samples import LabelMembers
from pipeline.shards.tar import TarMember, is_hidden, sample_key, tar_kind, tar_members
from pipeline.text import plural
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.images import is_image
from tools.shards.layouts.imagenet import ARCHIVES
from tools.shards.layouts.splits import files_of_split, folder_of_split, plain_name, visible_folders
from tools.shards.layouts.tar_labels import Listing, add_labelled_images, find_split_folder, label_images, plain_member
from tools.shards.layouts.walk import has_images, walk_images
from tools.shards.skipped_files import QUIET, describe_compression, file_kind


def open_tars(path: Path, split: str, spool: Path | None) -> Source | None:
    tars, num_others = _tars_of_split(path, split)
    if not tars:
        return None
    listing = _list_tars(tars, "")
    if path.is_dir() and not len(listing.catalogue) and has_images(path):
        return None  # the tar holds something else and lies next to images
    if below := find_split_folder(listing.catalogue, split, str(path)):
        listing = _list_tars(tars, below)
    name, classes, note = label_images(listing, tars, plain_name(path.with_suffix("") if path.is_file() else path))
    notes = [tars[0].name if len(tars) == 1 else f"{len(tars)} tars", note, *listing.notes()]
    if below:
        notes.append(f"images below {below}; {listing.elsewhere:,} of other splits are left out")
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
    root = path / folder_of_split(visible_folders(path), split, str(path))
    tars = sorted(tar for tar in root.glob("*.tar") if not tar.name.startswith("."))
    official = [tar for tar in tars if tar.name == ARCHIVES[split]]
    chosen = official or files_of_split(tars, split, root)
    return chosen, len(tars) - len(chosen)


def _list_tars(tars: list[Path], below: str) -> Listing:
    listing = Listing(Catalogue([FileRanges(tar) for tar in tars]), below)
    for container, tar in enumerate(tars):
        if packed := describe_compression(tar):
            raise ValueError(f"{tar}: {packed}")
        for inner in _list_members(listing, container, tar):
            stem, start = inner.name.rpartition(".")[0], len(listing.catalogue)
            if deeper := _list_members(listing, container, tar, inner):
                raise ValueError(
                    f"{tar}: {inner.name} contains a tar itself ({deeper[0].name}), and tars in tars are read one level "
                    f"deep: unpack {tar.name} and convert its content"
                )
            if len(listing.catalogue) > start:
                listing.inner.append((stem, start, len(listing.catalogue)))
    return listing


def _list_members(listing: Listing, container: int, tar: Path, inner: TarMember | None = None) -> list[TarMember]:
    """Add the images and labels of a tar, or of the tar `inner` inside it; returns the tars in it."""
    prefix = f"{inner.name.rpartition('.')[0]}/" if inner else ""
    start, stop = (inner.offset, inner.offset + inner.size) if inner else (0, None)
    images: list[TarMember] = []
    labels, tars = LabelMembers(), []
    for member in tar_members(tar, start, stop):
        is_ours = (prefix + plain_member(member.name)).startswith(listing.below)
        if is_hidden(member.name):
            listing.skipped[QUIET] += 1
        elif sample_key(member.name)[1] == "tar":
            tars.append(member)
        elif not is_image(member.name):
            if is_ours:
                labels.add(tar, member)
            listing.skipped[file_kind(member.name)] += 1
        elif is_ours:
            images.append(member)
        else:
            listing.elsewhere += 1
    add_labelled_images(listing, container, tar, prefix, images, labels)
    return tars
