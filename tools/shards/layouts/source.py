"""Which data set lies at a path: detect the layout, or open the requested one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.shards.index import UNLABELLED
from pipeline.shards.tar import tar_kind
from tools.shards.catalogue import Source
from tools.shards.file_kinds import describe_no_images, is_image, packed_with
from tools.shards.layouts.cifar import open_cifar
from tools.shards.layouts.flat import open_flat
from tools.shards.layouts.folders import folders_are_classes, open_folders
from tools.shards.layouts.idx import open_idx
from tools.shards.layouts.imagenet import open_imagenet_val
from tools.shards.layouts.kaggle import open_kaggle
from tools.shards.layouts.parquet import open_parquet
from tools.shards.layouts.tars import open_tars
from tools.shards.layouts.walk import image_folders, image_root, some, walk_images

# In the order they are tried. Each lists the images of a split of a path; None when the layout is not there. The third
# argument is a folder for what a layout must keep on disk (parquet only).
LAYOUTS: dict[str, Callable[[Path, str, Path | None], Source | None]] = {
    "imagenet-val": open_imagenet_val,
    "kaggle": open_kaggle,
    "cifar": open_cifar,
    "idx": open_idx,
    "parquet": open_parquet,
    "tars": open_tars,
    "folders": open_folders,
    "flat": open_flat,
}

PACKED_LAYOUTS = ("parquet", "tars")  # a neighbouring file of theirs must not hide images in folders


def open_source(path: Path, split: str, layout: str = "auto", spools: Path | None = None) -> Source:
    """List every image of one split.

    Raises FileNotFoundError when nothing is there, ValueError when it is not a layout we read, or not the requested one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    tried = set(LAYOUTS) if layout == "auto" else {layout}
    if layout == "auto" and not folders_are_classes(path, split):
        tried.remove("folders")
    for name, opener in LAYOUTS.items():
        if name in tried and (source := opener(path, split, spools)):
            if not len(source.catalogue):
                raise ValueError(f"{path}: no {split} images: {describe_no_images(source.skipped)}")
            if layout == "auto" and name in PACKED_LAYOUTS:
                _check_alone(path, name)
            return _with_sound_labels(source, path)
    if path.is_file() and (packed := packed_with(path)):
        raise ValueError(f"{path}: {packed}")
    requested = "" if layout == "auto" else f" with --layout {layout}"
    seen = _describe_content(path, split)
    raise ValueError(f"{path}: no {split} images found{requested}: {seen}. Check the path, --split and --layout")


def _check_alone(path: Path, layout: str) -> None:
    """Raise ValueError where folders of images lie beside archives of images: it is not clear which are meant."""
    if path.is_dir() and (folders := image_folders(path)):
        raise ValueError(
            f"{path}: images lie in {'tars' if layout == 'tars' else 'parquet files'} and in the folders {some(folders)} beside "
            f"them: choose --layout {layout}, folders or flat"
        )


def _with_sound_labels(source: Source, path: Path) -> Source:
    """Raise ValueError for a label without a class; say so where all images have one label."""
    labels = np.asarray(source.catalogue.label)
    highest = int(labels.max())
    if source.classes and highest >= len(source.classes):
        raise ValueError(
            f"{path}: label {highest} for {len(source.classes)} classes: the class list is of another data set"
        )
    if source.layout != "folders" and highest != UNLABELLED and (labels == highest).all():
        return replace(
            source, notes=(*source.notes, f"all images have one label, {highest}: accuracies will mean nothing")
        )
    return source


def _describe_content(path: Path, split: str) -> str:
    if path.is_file():
        single = is_image(path.name)
        return (
            "it is one image, give the folder that it lies in"
            if single
            else f"{tar_kind(path)}, not an archive we read"
        )
    counts = Counter[str]()
    num_images = sum(1 for _ in walk_images(image_root(path, split) or path, "", counts))
    return f"{num_images:,} images in files of their own" if num_images else describe_no_images(counts)
