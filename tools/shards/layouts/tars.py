"""Tars of images, whoever wrote them: one tar or a folder of them, WebDatasets, tars of class folders, tars of tars."""

import json
import os
import re
from collections import Counter
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.file_kinds import QUIET, is_hidden, is_image, kind, packed_with
from tools.shards.layouts.folders import ALL_SPLITS, SPLIT_NAMES, plain_name, split_root, walk_images
from tools.shards.layouts.imagenet import ARCHIVES
from tools.shards.layouts.tar_labels import Listing, label_images, set_labels, split_folder
from tools.shards.layouts.tar_members import TarMember, is_tar, tar_members

MAX_LABEL_BYTES = 1 << 20


def find_tars(path: Path, split: str) -> str:
    if path.is_file():
        return path.name if is_tar(path) else ""
    tars, _ = _tars(path, split)
    return f"{len(tars)} tars" if tars else ""


def _tars(path: Path, split: str) -> tuple[list[Path], int]:
    """One tar, or the tars of a folder; where some are named after a split, only those of ours; and how many are not ours."""
    if path.is_file():
        return [path], 0
    root = split_root(path, split)
    tars = sorted(root.glob("*.tar")) if root else []
    tars = [tar for tar in tars if not tar.name.startswith(".")]
    official = [tar for tar in tars if tar.name == ARCHIVES[split]]
    ours = [tar for tar in tars if _is_named_after(tar, SPLIT_NAMES[split])]
    others = [tar for tar in tars if _is_named_after(tar, ALL_SPLITS) and tar not in ours]
    chosen = official or ours or [tar for tar in tars if tar not in others]
    return chosen, len(tars) - len(chosen)


def _is_named_after(tar: Path, names: tuple[str, ...]) -> bool:
    return re.search(rf"(?<![a-z])({'|'.join(names)})(?![a-z])", tar.name.lower()) is not None


def open_tars(path: Path, split: str, work: Path | None) -> Source:
    tars, num_others = _tars(path, split)
    found = _list_tars(tars, "")
    if below := split_folder(found.catalogue, split, str(path)):
        found = _list_tars(tars, below)
    name, classes, note = label_images(found, tars, plain_name(path.with_suffix("") if path.is_file() else path))
    notes = [tars[0].name if len(tars) == 1 else f"{len(tars)} tars", note]
    if below:
        notes.append(f"images below {below}; {found.elsewhere:,} of other splits are left out")
    if num_others:
        notes.append(f"{num_others} tars beside them are not of the {split} split")
    if path.is_dir():
        notes += _notes_beside(tars[0].parent, found.passed_over)
    return Source("tars", name, found.catalogue, classes, notes=tuple(notes), passed_over=found.passed_over)


def _notes_beside(root: Path, passed_over: Counter[str]) -> list[str]:
    """Loose files in the folder of the tars."""
    num_images = sum(1 for _ in walk_images(root, "", passed_over))
    passed_over[".tar"] -= sum(not is_hidden(tar.name) for tar in root.glob("*.tar"))
    if not num_images:
        return []
    return [f"{num_images:,} images beside the tars are left out: --layout folders or flat takes those instead"]


def _list_tars(tars: list[Path], below: str) -> Listing:
    found = Listing(Catalogue([FileRanges(tar) for tar in tars]), below)
    for container, tar in enumerate(tars):
        if packed := packed_with(tar):
            raise ValueError(f"{tar}: {packed}")
        for inner in _add_images(found, container, tar, "", 0, None):
            inside, start = os.path.splitext(inner.name)[0], len(found.catalogue)
            deeper = _add_images(found, container, tar, f"{inside}/", inner.offset, inner.offset + inner.size)
            if deeper:
                raise ValueError(
                    f"{tar}: {inner.name} holds a tar itself ({deeper[0].name}), and tars in tars are read one level deep: "
                    f"unpack {tar.name} and give what lies in it"
                )
            if len(found.catalogue) > start:
                found.inner.append((inside, start, len(found.catalogue)))
    return found


def _add_images(
    found: Listing, container: int, tar: Path, inside: str, offset: int, stop: int | None
) -> list[TarMember]:
    """Add the images and labels of one tar, an outer or an inner one; returns the tars in it."""
    catalogue, start, inner = found.catalogue, len(found.catalogue), []
    labels: dict[str, int] = {}
    reader = FileRanges(tar)
    for member in tar_members(tar, offset, stop):
        stem, _, extension = member.name.rpartition(".")
        extension = extension.lower()
        if is_hidden(member.name):
            found.passed_over[QUIET] += 1
        elif extension == "tar":
            inner.append(member)
        elif not is_image(member.name):
            if extension in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                label = _parse_label(reader.read(member.offset, member.size, member.name), extension, tar, member)
                if label is not None and (extension == "cls" or stem not in labels):
                    labels[stem] = label
            found.passed_over[kind(member.name)] += 1
        elif (inside + member.name).startswith(found.below):
            catalogue.add(container, member.offset, member.size, UNLABELLED, inside + member.name)
        else:
            found.elsewhere += 1
    if labels:
        set_labels(catalogue, start, len(inside), labels, tar)
    return inner


def _parse_label(content: bytes, extension: str, tar: Path, member: TarMember) -> int | None:
    try:
        value = int(content) if extension == "cls" else json.loads(content)
        if isinstance(value, dict):
            value = value.get("label")
        return value if isinstance(value, int) and -(1 << 31) <= value < 1 << 31 else None
    except (ValueError, RecursionError):
        raise ValueError(
            f"{tar}: {member.name} at byte {member.offset} is no label: cls holds a number, json an object"
        ) from None
