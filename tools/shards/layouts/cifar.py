"""CIFAR-10 and CIFAR-100 as downloaded, the archives of the Python version, stored losslessly as PNG."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.shards.catalogue import Catalogue, Source


def open_cifar(path: Path, split: str, spools: Path) -> Source | None:
    """Read an archive with torchvision, if it has the published checksum: what is in it comes pickled."""
    candidates = [path] if path.is_file() else sorted(path.glob("cifar-*.tar.gz"))
    archive = next((file for file in candidates if file.name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz")), None)
    if archive is None or split not in ("train", "val"):
        return None
    from torchvision.datasets import CIFAR10, CIFAR100  # load torch, which takes seconds, and nothing else needs it
    from torchvision.datasets.utils import check_integrity

    dataset = CIFAR100 if "100" in archive.name else CIFAR10
    if not check_integrity(archive, dataset.tgz_md5):
        raise ValueError(f"{archive}: its checksum is not that of {dataset.__name__}: download it again")
    with TemporaryDirectory() as root:
        shutil.unpack_archive(archive, root, filter="data")
        images = dataset(root, train=split == "train")
    catalogue = Catalogue.of_pixels(images.data, images.targets)
    notes = (f"{archive.name}, with its published checksum",)
    return Source("cifar", dataset.__name__.lower(), catalogue, tuple(images.classes), notes=notes)
