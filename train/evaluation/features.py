"""The images and labels that an evaluation uses, and frozen features of them, extracted in bounded memory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from pipeline.loader import MultiCropLoader
from pipeline.memory import memory_limit, peak_memory
from pipeline.shards.index import UNLABELLED, ShardIndex
from pipeline.shards.manifest import check_class_count, read_manifest
from pipeline.text import truncate_list

Extractor = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""`[n, 3, S, S] float32, normalised -> {name: [n, D]}`; every extractor returns `last`."""

STORED_DTYPE = torch.float16  # half the memory of float32, at no visible cost in accuracy
MEMORY_SHARE = 0.5  # of the free memory, for the features of one split


class Features(NamedTuple):
    """`values`: `{name: [n, D] float16}` on the CPU; `labels`: `[n] int64`, -1 for unlabelled images."""

    values: dict[str, torch.Tensor]
    labels: torch.Tensor


def mixed_precision(crops: torch.Tensor) -> torch.autocast:
    """Return bf16 autocast on a GPU, as in training. CPUs are slower in bf16, so they compute in float32."""
    return torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.is_cuda)


def pooled_features(encoder: MultiCropEncoder) -> Extractor:
    """Return an extractor of `last`, `[n, D]`: the mean patch token after the final norm, as timm pools it."""
    return lambda crops: {"last": encoder([(crops, None)])[0].tokens.mean(dim=1)}


def pixels(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `last`, `[n, 3072]`: the crop shrunk to 32x32, or at its own size if that is smaller."""
    return {"last": F.adaptive_avg_pool2d(crops, min(32, crops.shape[-1])).flatten(1)}


def colour_histogram(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `last`, `[n, 512]`: square roots of a joint histogram, 8 bins per channel over -2.5..2.5 (normalised units)."""
    bins = ((crops + 2.5) / 5 * 8).floor().clamp(0, 7).long()
    codes = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(crops), 512, device=crops.device)
    return {"last": counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32)).sqrt()}


@torch.inference_mode()
def extract(loader: MultiCropLoader, extractors: Mapping[str, Extractor]) -> dict[str, Features]:
    """Return each extractor's features of all of `loader`, in one pass. Raises ValueError if they would not fit in memory."""
    loader.load_state_dict({"epoch": 0, "position": 0})
    count, done = len(loader.index), 0
    stores: dict[str, dict[str, torch.Tensor]] = {}
    labels = torch.empty(count, dtype=torch.int64)
    for batch in loader:
        crops = batch.crops[0]
        with mixed_precision(crops):
            outputs = {name: extractor(crops) for name, extractor in extractors.items()}
        if not stores:  # only now are the widths known
            _check_memory(loader, count, sum(part.shape[1] for parts in outputs.values() for part in parts.values()))
            stores = {
                name: {key: torch.empty(count, part.shape[1], dtype=STORED_DTYPE) for key, part in parts.items()}
                for name, parts in outputs.items()
            }
        rows = slice(done, done + len(batch.labels))
        for name, parts in outputs.items():
            for key, part in parts.items():
                stores[name][key][rows] = part.to("cpu", STORED_DTYPE)
        labels[rows] = batch.labels.cpu()
        done += len(batch.labels)
    loader.close()  # a training run goes on: it needs the memory, the threads and the room in the cache of shards
    return {name: Features(values, labels) for name, values in stores.items()}


def _check_memory(loader: MultiCropLoader, count: int, width: int) -> None:
    per_image, room = width * STORED_DTYPE.itemsize, MEMORY_SHARE * free_memory()
    if per_image * count > room:
        raise ValueError(
            f"{loader.index.folder}: the features of {count:,} images need {per_image * count / 2**30:.1f} GiB, but only "
            f"{room / 2**30:.1f} GiB are available. Lower evaluation.max_samples (--max-samples) to {int(room / per_image):,} "
            "or less"
        )


def free_memory() -> int:
    """Return the bytes that this machine, or the limit of this process, has left."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return max(0, min(1024 * int(fields["MemAvailable"].split()[0]), memory_limit() - peak_memory()))


def subsample_evenly(index: ShardIndex, max_samples: int) -> ShardIndex:
    """Return at most `max_samples` samples of the index, evenly spaced in stored order so that every class is represented."""
    if len(index) <= max_samples:
        return index
    samples = index.samples[np.arange(max_samples) * len(index) // max_samples]
    return replace(index, samples=samples, counts=np.bincount(samples["shard"], minlength=len(index.shards)))


def check_classes(train: ShardIndex, val: ShardIndex) -> None:
    """Raise ValueError if the manifests give one label two meanings, or if a manifest is damaged or names too few classes.

    Splits without class names are compared by `check_labels` only.
    """
    manifests = [read_manifest(index.folder) for index in (train, val)]
    for index, manifest in zip((train, val), manifests, strict=True):
        if manifest is not None:
            check_class_count(index.folder, index.samples["label"], manifest)
    train_names, val_names = (manifest.classes if manifest else () for manifest in manifests)
    extra = val_names[len(train_names) : int(val.samples["label"].max()) + 1]
    differing = [label for label, (a, b) in enumerate(zip(train_names, val_names, strict=False)) if a != b]
    if not train_names or not val_names or not (differing or extra):
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


class LabelProblems(NamedTuple):
    """Texts about the labels of two splits, each "" where all is well.

    `one_label`: all training images have the same label. `missing`: some images have none. Accuracies mean nothing then.
    `unknown`: labels of val that no training image has, whose images count as wrong.
    """

    one_label: str = ""
    missing: str = ""
    unknown: str = ""


def check_labels(train: ShardIndex, val: ShardIndex) -> LabelProblems:
    """Return what is wrong with the labels of an evaluation's splits."""
    one_label = missing = unknown = ""
    known, labels = np.unique(train.samples["label"]), val.samples["label"]
    if len(known) == 1 and known[0] != UNLABELLED:
        one_label = (
            f"{train.folder}: all {len(train):,} images have the label {known[0]}, so accuracies mean nothing: every image gets "
            "that label, regardless of its features. Convert a folder that holds one folder for each class"
        )
    for index in (val, train):
        if count := int((index.samples["label"] == UNLABELLED).sum()):
            missing = (
                f"{index.folder}: {count:,} of {len(index):,} samples without labels; accuracies need a label for "
                "each: convert class folders, or tars with cls members"
            )
    extra = np.setdiff1d(labels[labels != UNLABELLED], known)
    if len(extra):
        manifest = read_manifest(val.folder)
        names = dict(enumerate(manifest.classes if manifest else ()))
        shown = [f"{label} ({names[label]})" if label in names else str(label) for label in extra.tolist()]
        unknown = (
            f"{val.folder}: {int(np.isin(labels, extra).sum()):,} of {len(val):,} images have labels that no image of "
            f"{train.folder} has: {truncate_list(shown)}. They count as wrong in every accuracy"
        )
    return LabelProblems(one_label, missing, unknown)
