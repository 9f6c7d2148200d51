"""ImageNet-1k as it is distributed: the original archives with the devkit, and the Kaggle tree."""

import csv
import re
from importlib.resources import files
from pathlib import Path

import numpy as np

from tools.archives import read_tgz
from tools.catalogue import Catalogue, FileRanges, LooseFiles, Source, check_class_names
from tools.layout_folders import EXTENSIONS, add_images, subfolders, walk_images
from tools.matlab5 import read_struct
from tools.tar_members import is_tar, tar_members

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def wnid_order() -> list[str]:
    """The 1000 wnids in label order, as timm and everybody after Caffe numbers them."""
    return (files("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()


def find_archives(path: Path, split: str) -> str:
    archive = _archive(path, split)
    return f"{archive.name}" if archive else ""


def open_archives(path: Path, split: str, work: Path | None) -> Source:
    archive = _archive(path, split)
    assert archive is not None
    return _open_train(archive) if split == "train" else _open_val(archive)


def _archive(path: Path, split: str) -> Path | None:
    """The archive by its official name, or any tar of class tars that was named directly."""
    if path.is_dir():
        named = path / ARCHIVES.get(split, "")
        return named if named.is_file() else None
    if path.name == ARCHIVES.get(split):
        return path
    return path if split == "train" and path.suffix == ".tar" and _holds_class_tars(path) else None


def _holds_class_tars(path: Path) -> bool:
    if not is_tar(path):
        return False
    first = next(tar_members(path), None)
    return first is not None and first.name.endswith(".tar") and is_tar(path, first.offset)


def _open_train(archive: Path) -> Source:
    inner = [member for member in tar_members(archive) if member.name.endswith(".tar")]
    wnids = [Path(member.name).stem for member in inner]
    if not inner:
        raise ValueError(f"{archive}: holds no class tars: not {ARCHIVES['train']}")
    check_class_names(wnids, str(archive))
    classes = _label_order(wnids)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    catalogue = Catalogue([FileRanges(archive)])
    for wnid, member in zip(wnids, inner, strict=True):
        for image in tar_members(archive, member.offset, member.offset + member.size):
            if image.name.lower().endswith(EXTENSIONS):
                catalogue.add(0, image.offset, image.size, labels[wnid], f"{wnid}/{image.name}")
    return Source(
        "imagenet-tar", "imagenet", catalogue, tuple(classes), notes=(f"{archive.name}, {len(wnids)} class tars",)
    )


def _label_order(wnids: list[str]) -> list[str]:
    """The usual 1000 labels when all classes are among them (a subset keeps its labels), else sorted names."""
    usual = wnid_order()
    return usual if set(wnids) <= set(usual) else sorted(wnids)


def _open_val(archive: Path) -> Source:
    wnid_of_id, truth = _read_devkit(archive.parent)
    classes = _label_order(list(wnid_of_id.values()))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    catalogue = Catalogue([FileRanges(archive)])
    for image in tar_members(archive):
        number = re.search(r"ILSVRC2012_val_(\d{8})\.", image.name)
        if number is None:
            continue
        if not 1 <= int(number[1]) <= len(truth):
            raise ValueError(
                f"{archive}: {image.name} has no line in {GROUND_TRUTH} ({len(truth)} lines): wrong devkit"
            )
        catalogue.add(0, image.offset, image.size, labels[wnid_of_id[truth[int(number[1]) - 1]]], image.name)
    notes = (f"{archive.name}, labels from the devkit's ILSVRC2012_IDs",)
    return Source("imagenet-tar", "imagenet", catalogue, tuple(classes), notes=notes)


def _read_devkit(folder: Path) -> tuple[dict[int, str], list[int]]:
    """ILSVRC2012_ID -> wnid of the leaf classes, and the ID of every validation image in order."""
    archive, unpacked = folder / f"{DEVKIT}.tar.gz", folder / DEVKIT / "data"
    if archive.is_file():
        found = read_tgz(archive, lambda name: name in ("meta.mat", GROUND_TRUTH))
    elif unpacked.is_dir():
        found = {
            name: (unpacked / name).read_bytes() for name in ("meta.mat", GROUND_TRUTH) if (unpacked / name).is_file()
        }
    else:
        raise FileNotFoundError(
            f"{archive}: not there, and the labels of {ARCHIVES['val']} are in it: put it beside the tar"
        )
    if len(found) < 2:
        raise ValueError(f"{archive}: holds no meta.mat or no {GROUND_TRUTH}: download it again")
    truth = [int(line) for line in found[GROUND_TRUTH].split()]
    wnids = {}
    for synset in read_struct(found["meta.mat"], "synsets"):
        number, wnid, children = (synset.get(field) for field in ("ILSVRC2012_ID", "WNID", "num_children"))
        if (
            isinstance(number, np.ndarray)
            and isinstance(wnid, str)
            and isinstance(children, np.ndarray)
            and not children[0]
        ):
            wnids[int(number[0])] = wnid
    unknown = sorted(set(truth) - wnids.keys())
    if unknown:
        raise ValueError(f"{archive}: {GROUND_TRUTH} names ILSVRC2012_ID {unknown[0]}, meta.mat does not: wrong devkit")
    check_class_names(list(wnids.values()), str(archive))
    return wnids, truth


def find_kaggle(path: Path, split: str) -> str:
    root = _kaggle_root(path)
    return f"Kaggle tree {root}" if root and (root / "ILSVRC/Data/CLS-LOC" / split).is_dir() else ""


def _kaggle_root(path: Path) -> Path | None:
    candidates = (path, path.parent, *path.parents[1:3])
    return next((folder for folder in candidates if (folder / "ILSVRC/Data/CLS-LOC").is_dir()), None)


def open_kaggle(path: Path, split: str, work: Path | None) -> Source:
    """Train labels from the folders, val labels from LOC_val_solution.csv, order from LOC_synset_mapping.txt."""
    root = _kaggle_root(path)
    assert root is not None
    images = root / "ILSVRC/Data/CLS-LOC" / split
    classes, names = _synset_mapping(root, subfolders(images) if split == "train" else [])
    labels = {wnid: label for label, wnid in enumerate(classes)}
    catalogue = Catalogue([LooseFiles(images)])
    if split == "train":
        for wnid in subfolders(images):
            if wnid not in labels:
                raise ValueError(f"{images / wnid}: this class is not in LOC_synset_mapping.txt")
            add_images(catalogue, 0, images, wnid, labels[wnid])
    else:
        solution = _val_solution(root / "LOC_val_solution.csv")
        for name, size in walk_images(images, ""):
            wnid = solution.get(Path(name).stem, "")
            if wnid not in labels:
                raise ValueError(f"{images / name}: no line, or an unknown class {wnid!r}, in LOC_val_solution.csv")
            catalogue.add(0, 0, size, labels[wnid], name)
    return Source("kaggle", "imagenet", catalogue, tuple(classes), tuple(names), notes=(f"Kaggle tree {root}",))


def _synset_mapping(root: Path, folders: list[str]) -> tuple[list[str], list[str]]:
    mapping = root / "LOC_synset_mapping.txt"
    if not mapping.is_file():
        classes = _label_order(folders)
        return classes, []
    lines = [line.partition(" ") for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip()]
    wnids = [wnid for wnid, _, _ in lines]
    check_class_names(wnids, str(mapping))
    return wnids, [words for _, _, words in lines]


def _val_solution(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there, and the labels of the val images are in it: copy it from the Kaggle download"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= rows[0].keys():
        raise ValueError(f"{path}: needs the columns ImageId and PredictionString")
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows if row["PredictionString"].split()}
