"""Labels from a file with a line for each image: `name,label` as CSV, with tabs, or with blanks as in the lists of Caffe."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.samples import LABEL_NAMES, Label, label_of
from pipeline.shards.tar import sample_key
from pipeline.text import truncate_list
from tools.shards.catalogue import Source
from tools.shards.classes import number_labels
from tools.shards.layouts.imagenet import WNID

NAME_COLUMNS = ("name", "filename", "file_name", "file", "path", "image", "image_id", "imageid", "id")


def without_labels(source: Source) -> Source:
    return source.relabelled([UNLABELLED] * len(source.catalogue), (), "labels are left out, as --no-labels says")


def label_by_file(source: Source, path: Path) -> Source:
    """Replace the labels of a source by those that `read_labels` finds in a file."""
    labels, note = read_labels(path, source.catalogue.names)
    return source.relabelled(*number_labels(labels), note)


def read_labels(path: Path, names: Sequence[str]) -> tuple[list[Label], str]:
    """Return the label of each image, UNLABELLED without a line in the file, and a note on how many there are.

    A line names its image in full, without folders or without its extension; a header can name the columns. Raises ValueError
    where no line names an image, one names several, or two give one image different labels.
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
    name_column, label_column = _column(header, NAME_COLUMNS, 0), _column(header, LABEL_NAMES, 1)
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


def _column(header: Sequence[str], names: Sequence[str], usual: int) -> int:
    return next((header.index(name) for name in names if name in header), usual)
