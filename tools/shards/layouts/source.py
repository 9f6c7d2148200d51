"""Which data set lies at a path: detect the layout, or open the one that was named."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipeline.shards.scan import tar_kind
from tools.shards.catalogue import Source
from tools.shards.file_kinds import describe_no_images, is_image, packed_with
from tools.shards.layouts import arrays as layout_arrays
from tools.shards.layouts import folders as layout_folders
from tools.shards.layouts import imagenet as layout_imagenet
from tools.shards.layouts import parquet as layout_parquet
from tools.shards.layouts import tars as layout_tars
from tools.shards.layouts.folders import split_root, walk_images

Opener = Callable[[Path, str, Path | None], Source]

# In the order they are tried. Each `find` says in words what it saw, or "" when the layout is not there.
LAYOUTS: dict[str, tuple[Callable[[Path, str], str], Opener]] = {
    "imagenet-val": (layout_imagenet.find_val, layout_imagenet.open_val),
    "kaggle": (layout_imagenet.find_kaggle, layout_imagenet.open_kaggle),
    "cifar": (layout_arrays.find_cifar, layout_arrays.open_cifar),
    "idx": (layout_arrays.find_idx, layout_arrays.open_idx),
    "parquet": (layout_parquet.find_parquet, layout_parquet.open_parquet),
    "tars": (layout_tars.find_tars, layout_tars.open_tars),
    "folders": (layout_folders.find_folders, layout_folders.open_folders),
    "flat": (layout_folders.find_flat, layout_folders.open_flat),
}


def open_source(path: Path, split: str, layout: str = "auto", work: Path | None = None) -> Source:
    """List every image of one split. `work`: a folder for what a layout must keep on disk (parquet only).

    Raises FileNotFoundError when nothing is there, ValueError when it is not a layout we read, or not the one named.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    tried = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    if layout == "auto" and layout_folders.images_beside_folders(path, split):
        tried = {name: both for name, both in LAYOUTS.items() if name != "folders"}
    for find, opener in tried.values():
        if find(path, split):
            source = opener(path, split, work)
            if not len(source.catalogue):
                raise ValueError(f"{path}: no {split} images: {describe_no_images(source.passed_over)}")
            return source
    if path.is_file() and (packed := packed_with(path)):
        raise ValueError(f"{path}: {packed}")
    named = "" if layout == "auto" else f" as --layout {layout}"
    raise ValueError(
        f"{path}: no {split} images found{named}: {_seen(path, split)}. Look at the path, --split and --layout"
    )


def _seen(path: Path, split: str) -> str:
    if path.is_file() and is_image(path.name):
        return "it is one image, give the folder that it lies in"
    if path.is_file():
        return f"{tar_kind(path)}, and no archive that is read"
    counts = Counter[str]()
    num_images = sum(1 for _ in walk_images(split_root(path, split) or path, "", counts))
    return f"{num_images:,} images in files of their own" if num_images else describe_no_images(counts)
