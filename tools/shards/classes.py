"""One class order for all splits of a data set: a split that is converted after another adopts the labels of the first."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED, open_index
from pipeline.shards.manifest import Manifest, as_model, read_manifest, read_object
from pipeline.shards.samples import Label
from pipeline.text import truncate_list
from tools.shards.catalogue import Source, normalized_name
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER

INTEGER = re.compile(r"-?[0-9]{1,18}")
OTHER_SPLIT = {"train": "val", "val": "train"}


def are_integers(names: Iterable[str]) -> bool:
    return all(INTEGER.fullmatch(name) for name in names)


def class_order(names: Iterable[str]) -> list[str]:
    """Sort class names: as numbers when all are integers, so that 2 precedes 10; otherwise as text."""
    names = list(names)
    return sorted(names, key=lambda name: (int(name), name)) if are_integers(names) else sorted(names)


def number_labels(
    labels: Sequence[Label], order: Callable[[Iterable[str]], list[str]] = class_order
) -> tuple[list[int], tuple[str, ...]]:
    """Replace labels that are names by numbers in the order of the names; returns the names too, () where there are none.

    Where some labels are names, numbers are names too.
    """
    if not any(isinstance(label, str) for label in labels):
        return [int(label) for label in labels], ()
    names = order({str(label) for label in labels if label != UNLABELLED})
    number_of = {name: number for number, name in enumerate(names)}
    return [UNLABELLED if label == UNLABELLED else number_of[str(label)] for label in labels], tuple(names)


def adopt_classes(source: Source, out: Path, split: str) -> Source:
    """Return the source with the labels and classes of the other split in `out`, if that one has labels.

    Raises ValueError for a class or label that the other split lacks.
    """
    other = out / OTHER_SPLIT[split]
    known, labels = _classes_of(other), np.asarray(source.catalogue.label)
    used = np.unique(labels[labels != UNLABELLED]).tolist()
    if known is None or not used:
        return source
    names, words = known.classes, [source.classes[label] if source.classes else str(label) for label in used]
    if names and (source.classes or are_integers(names)):
        targets = _labels_of(words, names)
        note = f"class order of {other}" if source.classes else f"labels taken for the names of {other}"
    elif names:  # that cannot be compared with numbers
        targets = [label if label < len(names) else -1 for label in used]
        note = f"labels taken for the places in the class list of {other}"
    elif not source.classes or (open_index(other).samples["label"] == UNLABELLED).all():
        return source
    elif are_integers(words):
        targets = [int(word) for word in words]
        note = f"labels are the numbers that name the classes, as in {other}"
    else:
        note = f"cannot be compared with the classes of {other}, which have numbers and no names"
        return replace(source, notes=(*source.notes, note))
    if unknown := [word for word, target in zip(words, targets, strict=True) if target < 0]:
        lacks = f"{other}: lacks {len(unknown)} class{'es' if len(unknown) > 1 else ''} of the {split} images"
        remedy = (
            "Remove that folder, convert train first, and val after it; or choose another --out"
            if split == "train"
            else f"Rename those or leave them out; if {other} is of another data set, choose another --out"
        )
        raise ValueError(f"{lacks}: {truncate_list(unknown)}. {remedy}")
    target_of, notes = dict(zip(used, targets, strict=True)), () if source.classes == names else (note,)
    return source.relabelled((target_of.get(label, label) for label in source.catalogue.label), names, *notes)


def _classes_of(folder: Path) -> Manifest | None:
    """Return the manifest of a finished split, or the classes of an unfinished conversion. Raises ValueError for damage."""
    identity = folder / RECORD_FOLDER / IDENTITY_NAME
    if (manifest := read_manifest(folder)) is not None or not identity.exists():
        return manifest
    remedy = f"Remove {folder} and convert again"
    unfinished = as_model(Manifest, read_object(identity, remedy), identity, remedy)
    return unfinished if unfinished.classes else None


def _labels_of(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return each name's place among the known ones, -1 for an unknown name; integers are compared as numbers."""
    as_numbers = are_integers(names) and are_integers(known)

    def key(name: str) -> str:
        return str(int(name)) if as_numbers else normalized_name(name)

    places = {key(name): place for place, name in reversed(list(enumerate(known)))}
    return [places.get(key(name), -1) for name in names]
