"""Checks that accuracies on two splits are meaningful: every image labelled, several classes, the same ones in both."""

import numpy as np

from pipeline.shards.index import UNLABELLED, ShardIndex
from pipeline.shards.manifest import check_class_count, read_manifest
from pipeline.text import truncate_list


def check_classes(train: ShardIndex, val: ShardIndex) -> None:
    """Raise ValueError if the manifests give one label two meanings, or if a manifest is damaged or names too few classes.

    Splits without class names are compared by `unknown_labels` only.
    """
    classes = []
    for index in (train, val):
        manifest = read_manifest(index.folder)
        if manifest is not None:
            check_class_count(index.folder, index.samples["label"], manifest)
        classes.append(manifest.classes if manifest else ())
    train_names, val_names = classes
    if not train_names or not val_names:
        return
    extra = val_names[len(train_names) : int(val.samples["label"].max()) + 1]
    differing = [label for label, (a, b) in enumerate(zip(train_names, val_names, strict=False)) if a != b]
    if not differing and not extra:
        return
    parts = []
    for split, names, others in (("train", train_names, val_names), ("val", val_names, train_names)):
        if only := [name for name in names if name not in set(others)]:
            parts.append(f"only {split} has {truncate_list(only)}")
    if differing:
        label = differing[0]
        parts.append(f"label {label} is {train_names[label]!r} in train and {val_names[label]!r} in val")
    out = str(val.folder).rpartition("/")[0]
    raise ValueError(
        f"{val.folder}: the classes differ from those of {train.folder}: {'; '.join(parts)}. Accuracies would be wrong. Remove "
        f"{val.folder} and convert val again next to train (make_shards.py convert SOURCE --out {out} --split val): "
        "it then takes over train's classes"
    )


def check_labels(train: ShardIndex, val: ShardIndex) -> None:
    """Raise ValueError if accuracies mean nothing: an image has no label, or all training images have the same one."""
    for index in (train, val):
        if missing := int((index.samples["label"] == UNLABELLED).sum()):
            raise ValueError(
                f"{index.folder}: {missing:,} of {len(index):,} samples without labels; accuracies need a label for "
                "each: convert class folders, or tars with cls members"
            )
    if problem := one_label(train):
        raise ValueError(problem)


def one_label(index: ShardIndex) -> str:
    """Return an error text if all images of the split have the same label, else ""."""
    labels = index.samples["label"]
    if labels[0] == UNLABELLED or (labels != labels[0]).any():
        return ""
    return (
        f"{index.folder}: all {len(index):,} images have the label {labels[0]}, so accuracies mean nothing: every image gets "
        "that label, regardless of its features. Convert a folder that holds one folder for each class"
    )


def unknown_labels(train: ShardIndex, val: ShardIndex) -> str:
    """Return a warning that names the labels of val that no training image has, or "" if there are none."""
    labels = val.samples["label"]
    unknown = np.setdiff1d(labels[labels != UNLABELLED], train.samples["label"])
    if not len(unknown):
        return ""
    count, manifest = int(np.isin(labels, unknown).sum()), read_manifest(val.folder)
    names = dict(enumerate(manifest.classes if manifest else ()))
    shown = [f"{label} ({names[label]})" if label in names else str(label) for label in unknown.tolist()]
    return (
        f"{val.folder}: {count:,} of {len(val):,} images have labels that no image of {train.folder} has: "
        f"{truncate_list(shown)}. They count as wrong in every accuracy"
    )
