"""ImageNet-1k as Kaggle distributes it: a tree of folders with LOC_synset_mapping.txt and LOC_val_solution.csv."""

import csv
from collections import Counter
from pathlib import Path

from tools.shards.catalogue import Catalogue, LooseFiles, Source, check_class_names
from tools.shards.layouts.imagenet import label_order
from tools.shards.layouts.splits import visible_folders
from tools.shards.layouts.walk import add_images, walk_images

IMAGES = "ILSVRC/Data/CLS-LOC"


def open_kaggle(path: Path, split: str, spools: Path | None) -> Source | None:
    """Train labels from the folders, val labels from LOC_val_solution.csv, order from LOC_synset_mapping.txt."""
    candidates = (path, path.parent, *path.parents[1:3])
    root = next((folder for folder in candidates if (folder / IMAGES).is_dir()), None)
    if root is None or not (root / IMAGES / split).is_dir():
        return None
    images = root / IMAGES / split
    folders = visible_folders(images) if split == "train" else []
    classes, class_names = _synset_mapping(root / "LOC_synset_mapping.txt", folders)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    catalogue, skipped = Catalogue([LooseFiles(images)]), Counter[str]()
    if split == "train":
        for wnid in folders:
            if wnid not in labels:
                raise ValueError(f"{images / wnid}: this class is not in LOC_synset_mapping.txt")
            add_images(catalogue, images, wnid, labels[wnid], skipped)
    else:
        solution = _val_solution(root / "LOC_val_solution.csv")
        for name, size in walk_images(images, "", skipped):
            wnid = solution.get(Path(name).stem, "")
            if wnid not in labels:
                raise ValueError(f"{images / name}: no line, or an unknown class {wnid!r}, in LOC_val_solution.csv")
            catalogue.add(0, 0, size, labels[wnid], name)
    notes = (f"Kaggle tree {root}",)
    return Source("kaggle", "imagenet", catalogue, tuple(classes), tuple(class_names), notes=notes, skipped=skipped)


def _synset_mapping(mapping: Path, folders: list[str]) -> tuple[list[str], list[str]]:
    """The wnids in label order and their names in words."""
    if not mapping.is_file():
        return label_order(folders), []
    lines = [line.partition(" ") for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip()]
    wnids = [wnid for wnid, _, _ in lines]
    check_class_names(wnids, str(mapping))
    return wnids, [words for _, _, words in lines]


def _val_solution(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it holds the labels of the val images: copy it from the download")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= rows[0].keys():
        raise ValueError(f"{path}: needs the columns ImageId and PredictionString")
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows if row["PredictionString"].split()}
