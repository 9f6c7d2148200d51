"""Labels: numbers for class names, one class order for all splits of a data set, and lists with a line for each image."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED, open_index
from pipeline.shards.manifest import Manifest, as_model, read_manifest, read_object
from pipeline.shards.samples import LABEL_NAMES, Label, label_of
from pipeline.shards.tar import sample_key
from pipeline.text import truncate_list
from tools.shards.catalogue import Source, normalized_name
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER

INTEGER = re.compile(r"-?[0-9]{1,18}")
WNID = re.compile(r"n\d{8}")
NAME_COLUMNS = ("name", "filename", "file_name", "file", "path", "image", "image_id", "imageid", "id")


def are_integers(names: Iterable[str]) -> bool:
    return all(INTEGER.fullmatch(name) for name in names)


def class_order(names: Iterable[str]) -> list[str]:
    """Sort class names: as numbers when all are integers, so that 2 precedes 10; otherwise as text."""
    names = list(names)
    return sorted(names, key=lambda name: (int(name), name)) if are_integers(names) else sorted(names)


def number_labels(
    labels: Sequence[Label], order: Callable[[Iterable[str]], list[str]] = class_order
) -> tuple[list[int], tuple[str, ...]]:
    """Return labels as numbers, and the names in the order that numbers them, () for none; numbers among names are names."""
    if not any(isinstance(label, str) for label in labels):
        return [int(label) for label in labels], ()
    names = order({str(label) for label in labels if label != UNLABELLED})
    number_of = {name: number for number, name in enumerate(names)}
    return [UNLABELLED if label == UNLABELLED else number_of[str(label)] for label in labels], tuple(names)


def adopt_classes(source: Source, out: Path, split: str) -> Source:
    """Return the source in the class order of the other split in `out`, if there is one. Raises ValueError for other classes."""
    other = out / ("val" if split == "train" else "train")
    known, labels = _classes_of(other), np.asarray(source.catalogue.label)
    used = np.unique(labels[labels != UNLABELLED]).tolist()
    if known is None or not used:
        return source
    names, words = known.classes, {label: source.classes[label] if source.classes else str(label) for label in used}
    if names and (source.classes or are_integers(names)):
        targets = _places(words, names)
        note = f"class order of {other}" if source.classes else f"labels taken for the names of {other}"
    elif names:  # that cannot be compared with numbers
        targets = {label: label if label < len(names) else -1 for label in used}
        note = f"labels taken for the places in the class list of {other}"
    elif not source.classes or (open_index(other).samples["label"] == UNLABELLED).all():
        return source
    elif are_integers(words.values()):
        targets = {label: int(word) for label, word in words.items()}
        note = f"labels are the numbers that name the classes, as in {other}"
    else:
        note = f"cannot be compared with the classes of {other}, which have numbers and no names"
        return replace(source, notes=(*source.notes, note))
    if unknown := [words[label] for label, target in targets.items() if target < 0]:
        remedy = f"Rename those or leave them out; if {other} is of another data set, choose another --out"
        if split == "train":
            remedy = "Remove that folder, convert train first, and val after it; or choose another --out"
        lacks = f"{other}: lacks {len(unknown)} class{'es' if len(unknown) > 1 else ''} of the {split} images"
        raise ValueError(f"{lacks}: {truncate_list(unknown)}. {remedy}")
    note = "" if source.classes == names else note
    return source.relabelled((targets.get(label, label) for label in source.catalogue.label), names, note)


def _classes_of(folder: Path) -> Manifest | None:
    """Return the manifest of a finished split, or the classes of an unfinished conversion. Raises ValueError for damage."""
    identity = folder / RECORD_FOLDER / IDENTITY_NAME
    if (manifest := read_manifest(folder)) is not None or not identity.exists():
        return manifest
    remedy = f"Remove {folder} and convert again"
    unfinished = as_model(Manifest, read_object(identity, remedy), identity, remedy)
    return unfinished if unfinished.classes else None


def _places(words: dict[int, str], names: Sequence[str]) -> dict[int, int]:
    """Return each word's place among the names, -1 for none; integers are compared as numbers."""
    as_numbers = are_integers(words.values()) and are_integers(names)
    key: Callable[[str], str | int] = int if as_numbers else normalized_name
    places = {key(name): place for place, name in reversed(list(enumerate(names)))}
    return {label: places.get(key(word), -1) for label, word in words.items()}


def read_labels(path: Path, names: Sequence[str]) -> tuple[list[Label], str]:
    """Return the label of each image, UNLABELLED without a line in the file, and a note on how many there are.

    A line is `name,label`, as CSV, with tabs, or with blanks as in lists of Caffe. It names its image in full, or without folders
    or extension; a header can name the columns. Raises ValueError where no line names one, one names several, or labels differ.
    """
    lines = _read_lines(path)
    rows = defaultdict[str, set[int]](set)
    for row, name in enumerate(names):
        for text in (name, name.rpartition("/")[2]):
            rows[text].add(row)
            rows[sample_key(text)[0]].add(row)

    def find(text: str) -> set[int]:
        name = text.strip().removeprefix("./")
        return rows.get(name) or rows.get(name.rpartition("/")[2], set())

    header = [cell.strip().lower() for cell in lines[0]] if lines and not find(lines[0][0]) else []
    name_column = next((header.index(name) for name in NAME_COLUMNS if name in header), 0)
    label_column = next((header.index(name) for name in LABEL_NAMES if name in header), 1)
    labels: list[Label] = [UNLABELLED] * len(names)
    num_unknown = 0
    for line in lines[bool(header) :]:
        try:
            name, text = line[name_column], line[label_column].strip()
            # Kaggle lists boxes behind the class.
            label = label_of(text.split()[0] if WNID.match(text) else text) if text else UNLABELLED
        except (IndexError, ValueError):
            raise ValueError(f"{path}: {line!r} is no line with the name of an image and its one label") from None
        found = find(name)
        if len(found) > 1 or any(labels[row] not in (UNLABELLED, label) for row in found):
            what = "several images" if len(found) > 1 else "an image with two labels"
            raise ValueError(f"{path}: {name} names {what}: {truncate_list([names[row] for row in found])}")
        num_unknown += not found
        for row in found:
            labels[row] = label
    if num_unknown >= len(lines) - bool(header):
        raise ValueError(f"{path}: no line names an image; lines are like {lines[:1]}, and images like {truncate_list(names, 2)}")
    note = f"labels of {len(labels) - labels.count(UNLABELLED):,} of {len(labels):,} images from {path.name}"
    return labels, note + (f", {num_unknown:,} lines of which name no image" if num_unknown else "")


def _read_lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        mark = next((mark for mark in "\t," if mark in text.partition("\n")[0]), "")
        rows = csv.reader(text.splitlines(), delimiter=mark) if mark else (line.rsplit(None, 1) for line in text.splitlines())
        return [line for line in rows if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: no list of images and labels ({error})") from None
