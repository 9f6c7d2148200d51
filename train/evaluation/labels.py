"""Whether accuracies of two splits mean anything: labels of the same classes in both, a label for each image, and several."""

import logging

import numpy as np

from pipeline.shards.index import UNLABELLED, ShardIndex
from pipeline.shards.manifest import check_class_count, read_manifest

log = logging.getLogger(__name__)

MOST_LISTED = 5


def check_classes(train: ShardIndex, val: ShardIndex) -> None:
    """Raise ValueError where the manifests give one label two meanings, or where a manifest is damaged or names too few classes.

    Splits without class names are compared by `unknown_labels` alone.
    """
    manifests = [read_manifest(index.folder) for index in (train, val)]
    for index, manifest in zip((train, val), manifests, strict=True):
        if manifest is not None:
            check_class_count(index.folder, index.samples["label"], manifest)
    ours, theirs = (manifest.classes if manifest else () for manifest in manifests)
    if not ours or not theirs:
        return
    beyond = theirs[len(ours) : int(val.samples["label"].max()) + 1]
    differing = [label for label, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if not differing and not beyond:
        return
    parts = []
    for split, names, others in (("train", ours, theirs), ("val", theirs, ours)):
        if only := [name for name in names if name not in set(others)]:
            parts.append(f"only {split} has {listed(only)}")
    if differing:
        first = differing[0]
        parts.append(f"label {first} is {ours[first]!r} in train and {theirs[first]!r} in val")
    out = str(val.folder).rpartition("/")[0]
    raise ValueError(
        f"{val.folder}: the classes differ from those of {train.folder}: {'; '.join(parts)}. Accuracies would be wrong. Remove "
        f"{val.folder} and convert val again beside train (make_shards.py convert SOURCE --out {out} --split val): "
        "it then takes over train's classes"
    )


def check_labels(train: ShardIndex, val: ShardIndex) -> None:
    """Raise ValueError where accuracies mean nothing: an image without a label, or one label alone in train."""
    for index in (train, val):
        if missing := int((index.samples["label"] == UNLABELLED).sum()):
            raise ValueError(
                f"{index.folder}: {missing:,} of {len(index):,} samples without labels; accuracies need a label for "
                "each: convert class folders, or tars with cls members"
            )
    if fault := one_label(train):
        raise ValueError(fault)


def one_label(index: ShardIndex) -> str:
    """What is wrong with a split whose images all have the same label; "" for any other."""
    labels = index.samples["label"]
    if labels[0] == UNLABELLED or (labels != labels[0]).any():
        return ""
    return (
        f"{index.folder}: all {len(index):,} images have the label {labels[0]}, so accuracies mean nothing: every image is given "
        "that label, whatever its features. Convert a folder that holds one folder for each class"
    )


def unknown_labels(train: ShardIndex, val: ShardIndex) -> str:
    """Names the labels of val that no training image has; "" where there are none."""
    known, labels = np.unique(train.samples["label"]), val.samples["label"]
    unknown = np.unique(labels[(labels != UNLABELLED) & ~np.isin(labels, known)])
    if not len(unknown):
        return ""
    count, named = int(np.isin(labels, unknown).sum()), read_manifest(val.folder)
    names = named.classes if named else ()
    what = [f"{label} ({names[label]})" if 0 <= label < len(names) else str(label) for label in unknown.tolist()]
    return (
        f"{val.folder}: {count:,} of {len(val):,} images have labels that no image of {train.folder} has: {listed(what)}. They "
        "count as wrong in every accuracy"
    )


def listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + (f", ... ({len(names)})" if len(names) > MOST_LISTED else "")
