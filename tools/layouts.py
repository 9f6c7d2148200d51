"""Which data set lies at a path: detect the layout, or open the one that was named."""

from collections.abc import Callable
from pathlib import Path

from tools import layout_arrays, layout_folders, layout_imagenet, layout_parquet, layout_webdataset
from tools.catalogue import Source

Opener = Callable[[Path, str, Path | None], Source]

# In the order they are tried. Each `find` says in words what it saw, or "" when the layout is not there.
LAYOUTS: dict[str, tuple[Callable[[Path, str], str], Opener]] = {
    "imagenet-tar": (layout_imagenet.find_archives, layout_imagenet.open_archives),
    "kaggle": (layout_imagenet.find_kaggle, layout_imagenet.open_kaggle),
    "cifar": (layout_arrays.find_cifar, layout_arrays.open_cifar),
    "idx": (layout_arrays.find_idx, layout_arrays.open_idx),
    "parquet": (layout_parquet.find_parquet, layout_parquet.open_parquet),
    "webdataset": (layout_webdataset.find_webdataset, layout_webdataset.open_webdataset),
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
    for find, opener in tried.values():
        if find(path, split):
            return opener(path, split, work)
    raise ValueError(f"{path}: no {split} images found as {', '.join(tried)}. Look at the path, --split and --layout")
