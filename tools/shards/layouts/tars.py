"""Tars of images, whoever wrote them: one tar or a folder of them, WebDatasets, tars of class folders, tars of tars."""

import os
from collections import Counter
from pathlib import Path

from pipeline.shards.samples import LabelMembers
from pipeline.shards.tar import TarMember, is_hidden, sample_key, tar_kind, tar_members
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.file_kinds import QUIET, is_image, kind, packed_with
from tools.shards.layouts.imagenet import ARCHIVES
from tools.shards.layouts.splits import files_of_split, plain_name, split_root
from tools.shards.layouts.tar_labels import Listing, add_sample_images, label_images, plain, split_folder
from tools.shards.layouts.walk import has_images, walk_images


def open_tars(path: Path, split: str, spools: Path | None) -> Source | None:
    tars, num_others = _find_tars(path, split)
    if not tars:
        return None
    found = _list_tars(tars, "")
    if path.is_dir() and not len(found.catalogue) and has_images(path):
        return None  # a tar of something else beside the images
    if below := split_folder(found.catalogue, split, str(path)):
        found = _list_tars(tars, below)
    name, classes, note = label_images(found, tars, plain_name(path.with_suffix("") if path.is_file() else path))
    notes = [tars[0].name if len(tars) == 1 else f"{len(tars)} tars", note, *found.notes()]
    if below:
        notes.append(f"images below {below}; {found.elsewhere:,} of other splits are left out")
    if num_others:
        notes.append(f"{num_others} tars beside them are not of the {split} split")
    if path.is_dir():
        notes += _notes_beside(tars[0].parent, found.skipped)
    return Source("tars", name, found.catalogue, classes, notes=tuple(notes), skipped=found.skipped)


def _find_tars(path: Path, split: str) -> tuple[list[Path], int]:
    """One tar, or the tars of a split in a folder; and how many tars there are not ours."""
    if path.is_file():
        return ([path] if tar_kind(path) == "a tar" else []), 0
    root = split_root(path, split)
    tars = sorted(tar for tar in root.glob("*.tar") if not tar.name.startswith(".")) if root else []
    official = [tar for tar in tars if tar.name == ARCHIVES[split]]
    chosen = official or files_of_split(tars, split)
    return chosen, len(tars) - len(chosen)


def _notes_beside(root: Path, skipped: Counter[str]) -> list[str]:
    """Loose files in the folder of the tars."""
    num_images = sum(1 for _ in walk_images(root, "", skipped))
    skipped[".tar"] -= sum(not is_hidden(tar.name) for tar in root.glob("*.tar"))
    if not num_images:
        return []
    return [f"{num_images:,} images beside the tars are left out: use --layout folders or flat for those"]


def _list_tars(tars: list[Path], below: str) -> Listing:
    found = Listing(Catalogue([FileRanges(tar) for tar in tars]), below)
    for container, tar in enumerate(tars):
        if packed := packed_with(tar):
            raise ValueError(f"{tar}: {packed}")
        for inner in _add_images(found, container, tar):
            stem, start = os.path.splitext(inner.name)[0], len(found.catalogue)
            if deeper := _add_images(found, container, tar, stem, inner):
                raise ValueError(
                    f"{tar}: {inner.name} contains a tar itself ({deeper[0].name}), and tars in tars are read one level "
                    f"deep: unpack {tar.name} and convert its content"
                )
            if len(found.catalogue) > start:
                found.inner.append((stem, start, len(found.catalogue)))
    return found


def _add_images(
    found: Listing, container: int, tar: Path, stem: str = "", inner: TarMember | None = None
) -> list[TarMember]:
    """Add the images and labels of one tar, or of the inner tar named `stem`; returns the tars in it."""
    prefix = f"{stem}/" if inner else ""
    start, stop = (inner.offset, inner.offset + inner.size) if inner else (0, None)
    images: list[TarMember] = []
    labels, tars = LabelMembers(), []
    for member in tar_members(tar, start, stop):
        is_ours = (prefix + plain(member.name)).startswith(found.below)
        if is_hidden(member.name):
            found.skipped[QUIET] += 1
        elif sample_key(member.name)[1] == "tar":
            tars.append(member)
        elif not is_image(member.name):
            if is_ours:
                labels.add(tar, member)
            found.skipped[kind(member.name)] += 1
        elif is_ours:
            images.append(member)
        else:
            found.elsewhere += 1
    add_sample_images(found, container, tar, prefix, images, labels)
    return tars
