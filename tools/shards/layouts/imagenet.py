"""The original validation archive of ImageNet-1k with its devkit; and how the classes of ImageNet are numbered.

The train archive is a tar of class tars, which `tars` reads.
"""

import io
import re
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.shards.tar import tar_members
from tools.shards.archives import read_tgz
from tools.shards.catalogue import Catalogue, FileRanges, Source, check_class_names

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def is_wnid(name: str) -> bool:
    return WNID.fullmatch(name) is not None


def label_order(wnids: list[str]) -> list[str]:
    """The usual 1000 wnids when all classes are among them, so that a subset keeps its labels; else sorted names.

    The usual order is that of Caffe, timm and most others.
    """
    spec = find_spec("timm")  # importing it would load torch: seconds
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
        number = re.search(r"ILSVRC2012_val_(\d{8})\.", image.name)
        if number is None:
            continue
        if not 1 <= int(number[1]) <= len(truth):
            lines = f"{GROUND_TRUTH} ({len(truth)} lines)"
            raise ValueError(f"{archive}: {image.name} has no line in {lines}: wrong devkit")
        catalogue.add(0, image.offset, image.size, labels[wnid_of_id[truth[int(number[1]) - 1]]], image.name)
    notes = (f"{archive.name}, labels from the devkit's ILSVRC2012_IDs",)
    return Source("imagenet-val", "imagenet", catalogue, tuple(classes), notes=notes)


def _read_devkit(folder: Path) -> tuple[dict[int, str], list[int]]:
    """ILSVRC2012_ID -> wnid of the leaf classes, and the ID of every validation image in order."""
    archive, unpacked, wanted = folder / f"{DEVKIT}.tar.gz", folder / DEVKIT / "data", ("meta.mat", GROUND_TRUTH)
    if archive.is_file():
        found = read_tgz(archive, lambda name: name in wanted)
    elif unpacked.is_dir():
        found = {name: (unpacked / name).read_bytes() for name in wanted if (unpacked / name).is_file()}
    else:
        raise FileNotFoundError(f"{archive}: missing; it holds the labels of {ARCHIVES['val']}: put it beside the tar")
    if len(found) < 2:
        raise ValueError(f"{archive}: holds no meta.mat or no {GROUND_TRUTH}: download it again")
    truth = [int(line) for line in found[GROUND_TRUTH].split()]
    wnids = _read_synsets(found["meta.mat"], str(archive))
    if unknown := sorted(set(truth) - wnids.keys()):
        raise ValueError(f"{archive}: {GROUND_TRUTH} uses ILSVRC2012_ID {unknown[0]}, not in meta.mat: wrong devkit")
    check_class_names(list(wnids.values()), str(archive))
    return wnids, truth


def _read_synsets(content: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid of the synsets without children."""
    from scipy.io import loadmat  # half a second, and nothing else needs it
    from scipy.io.matlab import MatReadError

    # What SciPy raises on damaged bytes, an UnboundLocalError among it.
    known = (ValueError, TypeError, LookupError, NameError, ArithmeticError, OSError, MemoryError, NotImplementedError)
    try:
        synsets = loadmat(io.BytesIO(content), variable_names=["synsets"], squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if not int(synset["num_children"])]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    except (*known, MatReadError, zlib.error) as error:
        raise ValueError(f"{where}: meta.mat is not the devkit's MATLAB file ({error}): download it again") from None
