"""ImageNet-1k: the original validation archive with its devkit, and the label order.

The original train archive is a tar of class tars, which `tars` reads.
"""

import io
import re
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.shards.tar import tar_members
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.layouts.archives import read_tgz

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT, META, GROUND_TRUTH = "ILSVRC2012_devkit_t12", "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
WNID, VAL_IMAGE = re.compile(r"n\d{8}"), re.compile(r"ILSVRC2012_val_(\d{8})\.")
# SciPy raises these on damaged bytes; NameError includes an UnboundLocalError.
SCIPY_ERRORS = (
    ArithmeticError, LookupError, MemoryError, NameError, NotImplementedError, OSError, TypeError, ValueError, zlib.error,
)  # fmt: skip


def are_wnids(names: list[str]) -> bool:
    return bool(names) and all(map(WNID.fullmatch, names))


def label_order(wnids: list[str]) -> list[str]:
    """Return the 1000 wnids in the order of Caffe and timm if they include all of `wnids`, else `wnids` sorted.

    A subset of ImageNet thus keeps the usual labels.
    """
    spec = find_spec("timm")  # importing it would load torch, which takes seconds
    assert spec is not None
    assert spec.origin is not None
    usual = (Path(spec.origin).parent / "data/_info/imagenet_synsets.txt").read_text().split()
    return usual if set(wnids) <= set(usual) else sorted(wnids)


def open_imagenet_val(path: Path, split: str, spools: Path | None) -> Source | None:
    archive = path if path.name == ARCHIVES["val"] else path / ARCHIVES["val"]
    if split != "val" or not archive.is_file():
        return None
    wnid_of_id, truth = _read_devkit(archive.parent)
    classes = label_order(list(wnid_of_id.values()))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    catalogue = Catalogue([FileRanges(archive)])
    for image in tar_members(archive):
        if match := VAL_IMAGE.search(image.name):
            number = int(match[1])
            if not 1 <= number <= len(truth):
                lines = f"{GROUND_TRUTH} ({len(truth)} lines)"
                raise ValueError(f"{archive}: {image.name} has no line in {lines}: wrong devkit")
            catalogue.add(0, image.offset, image.size, labels[wnid_of_id[truth[number - 1]]], image.name)
    notes = (f"{archive.name}, labels from the devkit's ILSVRC2012_IDs",)
    return Source("imagenet-val", "imagenet", catalogue, tuple(classes), notes=notes)


def _read_devkit(folder: Path) -> tuple[dict[int, str], list[int]]:
    """Return the wnid of each leaf class by its ILSVRC2012_ID, and the ID of every validation image in order."""
    from scipy.io import loadmat  # takes half a second, and nothing else needs it
    from scipy.io.matlab import MatReadError

    archive, unpacked, names = folder / f"{DEVKIT}.tar.gz", folder / DEVKIT / "data", (META, GROUND_TRUTH)
    if archive.is_file():
        files = read_tgz(archive, names)
    elif unpacked.is_dir():
        files = {name: (unpacked / name).read_bytes() for name in names if (unpacked / name).is_file()}
    else:
        raise FileNotFoundError(f"{archive}: missing; it holds the labels of {ARCHIVES['val']}: put it next to the tar")
    if len(files) < len(names):
        raise ValueError(f"{archive}: holds no {META} or no {GROUND_TRUTH}: download it again")
    truth = [int(line) for line in files[GROUND_TRUTH].split()]
    try:
        synsets = loadmat(io.BytesIO(files[META]), variable_names=["synsets"], squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if not int(synset["num_children"])]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    except (*SCIPY_ERRORS, MatReadError) as error:
        raise ValueError(f"{archive}: {META} is not the devkit's MATLAB file ({error}): download it again") from None
    if unknown := sorted(set(truth) - wnids.keys()):
        raise ValueError(f"{archive}: {GROUND_TRUTH} uses ILSVRC2012_ID {unknown[0]}, not in {META}: wrong devkit")
    return wnids, truth
