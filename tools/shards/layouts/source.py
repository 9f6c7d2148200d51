"""Opens the data set at a path: detects its layout, or uses the requested one."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from pipeline.shards.side_folders import first_folder
from pipeline.shards.tar import tar_kind
from pipeline.text import plural, truncate_list
from tools.shards.catalogue import Source, check_class_names
from tools.shards.formats import describe_file, describe_no_images, is_image
from tools.shards.layouts.arrays import open_cifar, open_idx
from tools.shards.layouts.folders import NoSplitError, open_files, walk_images
from tools.shards.layouts.imagenet import open_imagenet_val
from tools.shards.layouts.parquet import open_parquet
from tools.shards.layouts.tars import open_tars

# In the order in which they are tried. Each lists the images of one split of a path, and returns None when the path has
# another layout. The third argument is the folder in which `parquet` spools images.
LAYOUTS: dict[str, Callable[[Path, str, Path], Source | None]] = {
    "imagenet-val": open_imagenet_val,
    "cifar": open_cifar,
    "idx": open_idx,
    "parquet": open_parquet,
    "tars": open_tars,
    "folders": partial(open_files, labelled=True),
    "flat": partial(open_files, labelled=False),
}
FILES_OF = {"parquet": "parquet files", "tars": "tars"}  # layouts whose files can lie next to folders of images


def open_source(path: Path, split: str, spools: Path, layout: str = "auto") -> Source:
    """List every image of a split, of test where there is no val. Raises FileNotFoundError, ValueError for another layout."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for snapshots in (path / "snapshots", path):
        several = sorted(snapshots.iterdir(), key=os.path.getmtime) if (snapshots / "../blobs").is_dir() else []
        if snapshots.name == "snapshots" and len(several) > 1:
            raise ValueError(
                f"{snapshots}: {len(several)} snapshots of one data set in a cache of the Hugging Face hub: every image would be "
                f"taken {len(several)} times. Give one of them, such as the newest: {several[-1]}"
            )
    try:
        return _open_split(path, split, layout, spools)
    except NoSplitError as error:
        if split != "val":
            raise
        try:
            source = _open_split(path, "test", layout, spools)
        except ValueError:
            raise error from None
        return replace(source, notes=(*source.notes, "no val images: those of the test split are taken"))


def _open_split(path: Path, split: str, layout: str, spools: Path) -> Source:
    tried = {"auto": LAYOUTS | {"folders": open_files}}.get(layout) or {layout: LAYOUTS[layout]}
    for name, open_layout in tried.items():
        if source := open_layout(path, split, spools):
            if not len(source.catalogue):
                raise ValueError(f"{path}: no {split} images: {describe_no_images(source.skipped)}")
            beside = walk_images(path, "", Counter()) if layout == "auto" and name in FILES_OF and path.is_dir() else ()
            if folders := sorted({first_folder(image) for image, _ in beside} - {""}):
                raise ValueError(
                    f"{path}: images lie in {FILES_OF[name]} and in the folders {truncate_list(folders)} next to them: "
                    f"choose --layout {name}, folders or flat"
                )
            check_class_names(source.classes, str(path))
            labels, num_classes = source.catalogue.label, len(source.classes)
            if wrong := [label for label in (min(labels), max(labels)) if label < UNLABELLED or label >= num_classes > 0]:
                also = "damaged, or the class list is of another data set"
                raise ValueError(f"{path}: label {wrong[0]} for {num_classes} classes: {also}")
            return source
    if path.is_file():
        if what := describe_file(path):
            raise ValueError(f"{path}: {what}")
        one_image = "it is one image, convert the folder that it lies in"
        content = one_image if is_image(path.name) else f"{tar_kind(path)}, not an archive we read"
    else:
        counts = Counter[str]()
        num_images = sum(1 for _ in walk_images(path, "", counts))
        content = f"{plural(num_images, 'image')} in files of their own" if num_images else describe_no_images(counts)
    requested = "" if layout == "auto" else f" with --layout {layout}"
    raise NoSplitError(f"{path}: no {split} images found{requested}: {content}. Check the path, --split and --layout")
