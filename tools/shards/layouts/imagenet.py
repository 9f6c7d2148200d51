"""ImageNet-1k as it is distributed: the original archives with the devkit, and the Kaggle tree."""

import csv
import io
import re
import zlib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tools.shards.archives import read_tgz
from tools.shards.catalogue import Catalogue, FileRanges, LooseFiles, Source, check_class_names
from tools.shards.layouts.folders import add_images, subfolders, walk_images
from tools.shards.layouts.tar_members import tar_members

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def wnid_order() -> list[str]:
    """The 1000 wnids in label order, as timm and everybody after Caffe numbers them."""
    spec = find_spec("timm")  # importing it would bring torch along: seconds
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "data/_info/imagenet_synsets.txt").read_text().split()


def is_wnid(name: str) -> bool:
    return WNID.fullmatch(name) is not None


def label_order(wnids: list[str]) -> list[str]:
    """The usual 1000 labels when all classes are among them (a subset keeps its labels), else sorted names."""
    usual = wnid_order()
    return usual if set(wnids) <= set(usual) else sorted(wnids)


def find_val(path: Path, split: str) -> str:
    archive = _val_archive(path)
    return archive.name if split == "val" and archive.is_file() else ""


def _val_archive(path: Path) -> Path:
    return path if path.name == ARCHIVES["val"] else path / ARCHIVES["val"]


def open_val(path: Path, split: str, work: Path | None) -> Source:
    archive = _val_archive(path)
    wnid_of_id, truth = _read_devkit(archive.parent)
    classes = label_order(list(wnid_of_id.values()))
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
    return Source("imagenet-val", "imagenet", catalogue, tuple(classes), notes=notes)


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
    wnids = _read_synsets(found["meta.mat"], str(archive))
    unknown = sorted(set(truth) - wnids.keys())
    if unknown:
        raise ValueError(f"{archive}: {GROUND_TRUTH} names ILSVRC2012_ID {unknown[0]}, meta.mat does not: wrong devkit")
    check_class_names(list(wnids.values()), str(archive))
    return wnids, truth


def _read_synsets(content: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid of the synsets without children."""
    from scipy.io import loadmat  # half a second, and nothing else needs it
    from scipy.io.matlab import MatReadError

    # What SciPy lets out on damaged bytes, an UnboundLocalError among it.
    known = (ValueError, TypeError, LookupError, NameError, ArithmeticError, OSError, MemoryError, NotImplementedError)
    try:
        synsets = loadmat(io.BytesIO(content), variable_names=["synsets"], squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if not int(synset["num_children"])]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    except (*known, MatReadError, zlib.error) as error:
        raise ValueError(f"{where}: meta.mat is not the devkit's MATLAB file ({error}): download it again") from None


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
    catalogue, passed_over = Catalogue([LooseFiles(images)]), Counter[str]()
    if split == "train":
        for wnid in subfolders(images):
            if wnid not in labels:
                raise ValueError(f"{images / wnid}: this class is not in LOC_synset_mapping.txt")
            add_images(catalogue, 0, images, wnid, labels[wnid], passed_over)
    else:
        solution = _val_solution(root / "LOC_val_solution.csv")
        for name, size in walk_images(images, "", passed_over):
            wnid = solution.get(Path(name).stem, "")
            if wnid not in labels:
                raise ValueError(f"{images / name}: no line, or an unknown class {wnid!r}, in LOC_val_solution.csv")
            catalogue.add(0, 0, size, labels[wnid], name)
    notes = (f"Kaggle tree {root}",)
    return Source("kaggle", "imagenet", catalogue, tuple(classes), tuple(names), notes=notes, passed_over=passed_over)


def _synset_mapping(root: Path, folders: list[str]) -> tuple[list[str], list[str]]:
    mapping = root / "LOC_synset_mapping.txt"
    if not mapping.is_file():
        classes = label_order(folders)
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
