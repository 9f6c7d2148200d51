"""ImageNet-1k: the original validation archive with its devkit, and the label order. `tars` reads the train archive."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.shards.tar import tar_members
from tools.shards.catalogue import Catalogue, FileRanges, Source
from tools.shards.labels import WNID

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.")


def are_wnids(names: list[str]) -> bool:
    return bool(names) and all(map(WNID.fullmatch, names))


def label_order(wnids: Iterable[str]) -> list[str]:
    """Return the 1000 wnids in the order of Caffe and timm, if `wnids` are a subset of them, else `wnids` sorted."""
    spec = find_spec("timm")  # importing it would load torch, which takes seconds
    assert spec is not None
    assert spec.origin is not None
    usual = (Path(spec.origin).parent / "data/_info/imagenet_synsets.txt").read_text().split()
    return usual if set(wnids) <= set(usual) else sorted(wnids)


def open_imagenet_val(path: Path, split: str, spools: Path) -> Source | None:
    archive = path if path.name == ARCHIVES["val"] else path / ARCHIVES["val"]
    if split != "val" or not archive.is_file():
        return None
    wnids, truth = _read_devkit(archive.parent)
    classes = label_order(wnids)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    catalogue = Catalogue([FileRanges(archive)])
    for image in tar_members(archive):
        if match := VAL_IMAGE.search(image.name):
            number = int(match[1])
            if not 1 <= number <= len(truth):
                raise ValueError(f"{archive}: {image.name}: {DEVKIT} has labels of {len(truth):,} images only")
            catalogue.add(0, image.offset, image.size, labels[truth[number - 1]], image.name)
    note = f"{archive.name}, labels from the devkit's ILSVRC2012_IDs"
    return Source("imagenet-val", "imagenet", catalogue, tuple(classes), notes=(note,))


def _read_devkit(folder: Path) -> tuple[list[str], list[str]]:
    """Return the wnids of the classes, and that of every validation image in order; torchvision compares the checksum first."""
    from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive  # load torch, and nothing else needs it

    archive = folder / DEVKIT
    if not archive.is_file():
        raise FileNotFoundError(f"{archive}: missing; it holds the labels of {ARCHIVES['val']}: put it next to the tar")
    with TemporaryDirectory() as root:
        Path(root, DEVKIT).symlink_to(archive.resolve())
        try:
            parse_devkit_archive(root)
        except RuntimeError:
            raise ValueError(f"{archive}: its checksum is not that of ImageNet's devkit: download it again") from None
        words, truth = load_meta_file(root)
    return list(words), truth
