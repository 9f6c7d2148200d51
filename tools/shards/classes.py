"""One order of classes for the splits of a data set: a split that is converted beside another takes over that one's."""

import copy
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED
from pipeline.shards.index_file import load_index
from pipeline.shards.manifest import Manifest, read_manifest, read_object
from tools.shards.catalogue import Source
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER

INTEGER = re.compile(r"-?[0-9]{1,18}")
OTHER_SPLIT = {"train": "val", "val": "train"}
MOST_LISTED = 5


def are_integers(names: Iterable[str]) -> bool:
    return all(INTEGER.fullmatch(name) for name in names)


def class_order(names: Iterable[str]) -> list[str]:
    """Sorted: as numbers where all names are integers, so that 2 comes before 10; otherwise as text."""
    names = list(names)
    return sorted(names, key=lambda name: (int(name), name)) if are_integers(names) else sorted(names)


def with_classes_beside(source: Source, out: Path, split: str) -> Source:
    """The source with the labels and classes of the other split in `out`, if there is one that has labels.

    Raises ValueError for a class or label that the other split lacks.
    """
    other = out / OTHER_SPLIT[split]
    beside, labels = _classes_of(other), np.asarray(source.catalogue.label)
    used = np.unique(labels[labels != UNLABELLED]).tolist()
    if beside is None or not used:
        return source
    if beside.classes and source.classes:
        targets = _places(source.classes, beside.classes)
        _refuse_unknown([source.classes[label] for label in used if targets[label] < 0], other, split)
        note = "" if source.classes == beside.classes else f"class order of {other}"
        return _relabelled(source, dict(enumerate(targets)), beside, note)
    if beside.classes:
        return _named(source, used, beside, other, split)
    if source.classes and _has_labels(other):
        if not are_integers(source.classes):
            return _noted(source, f"cannot be compared with the classes of {other}, which have numbers and no names")
        numbers = {label: int(name) for label, name in enumerate(source.classes)}
        return _relabelled(source, numbers, beside, f"labels are the numbers that name the classes, as in {other}")
    return source


def _named(source: Source, used: list[int], beside: Manifest, other: Path, split: str) -> Source:
    """Numbers without names, beside a split with names: the names themselves where those are integers, else places."""
    by_name = are_integers(beside.classes)
    places = _places([str(label) for label in used], beside.classes) if by_name else used
    known = range(len(beside.classes))
    unknown = [str(label) for label, place in zip(used, places, strict=True) if place not in known]
    _refuse_unknown(unknown, other, split)
    read_as = "names" if by_name else "places in the class list"
    return _relabelled(
        source, dict(zip(used, places, strict=True)), beside, f"labels taken for the {read_as} of {other}"
    )


def _classes_of(folder: Path) -> Manifest | None:
    """Of a finished split, or of a conversion that is under way. Raises ValueError for a damaged manifest."""
    if (manifest := read_manifest(folder)) is not None:
        return manifest
    plan = folder / RECORD_FOLDER / IDENTITY_NAME
    if not plan.exists():
        return None
    classes = read_object(plan, f"Remove {folder} and convert again").get("classes")
    if not classes or not isinstance(classes, list):
        return None
    return Manifest(classes=tuple(map(str, classes)))


def _has_labels(folder: Path) -> bool:
    try:
        _, samples, _ = load_index(folder, f"Remove {folder} and convert again")
    except FileNotFoundError:
        return False
    return bool((samples["label"] != UNLABELLED).any())


def _places(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """The place of each name among the known ones, -1 where there is none; integers are compared as numbers."""
    as_numbers = are_integers(names) and are_integers(known)
    places = {_plain(name, as_numbers): place for place, name in reversed(list(enumerate(known)))}
    return [places.get(_plain(name, as_numbers), -1) for name in names]


def _plain(name: str, as_number: bool) -> str:
    """What `check_class_names` compares; macOS and Linux write one accented name in two forms."""
    return str(int(name)) if as_number else unicodedata.normalize("NFC", name).strip().casefold()


def _refuse_unknown(unknown: list[str], other: Path, split: str) -> None:
    if not unknown:
        return
    listed = ", ".join(unknown[:MOST_LISTED]) + (", ..." if len(unknown) > MOST_LISTED else "")
    what = f"{other}: lacks {len(unknown)} class{'es' if len(unknown) > 1 else ''} of the {split} images: {listed}"
    if split == "train":
        raise ValueError(f"{what}. Remove that folder, convert train first, and val after it; or choose another --out")
    raise ValueError(f"{what}. Rename those or leave them out; if {other} is of another data set, choose another --out")


def _relabelled(source: Source, places: dict[int, int], beside: Manifest, note: str) -> Source:
    """`places`: the new label of each old one."""
    catalogue = copy.copy(source.catalogue)
    catalogue.label = array("i", (places.get(label, label) for label in source.catalogue.label))
    changed = replace(source, catalogue=catalogue, classes=beside.classes, class_names=beside.class_names)
    return _noted(changed, note) if note else changed


def _noted(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))
