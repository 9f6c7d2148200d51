"""Pixel arrays as downloaded, stored losslessly as PNG: CIFAR's archives of the Python version, and IDX files as of MNIST."""

import gzip
import re
import shutil
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tools.shards.catalogue import Catalogue, Source
from tools.shards.layouts.folders import plain_name

IDX_FILE = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
PREFIX = {"train": "train", "val": "t10k"}  # there is no third split
MAX_UNPACKED = 512 << 20  # ten times the largest file; longer ones are cut off and fit no sizes
CLOTHES = "t-shirt/top, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle-boot"


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


def open_idx(path: Path, split: str, spools: Path) -> Source | None:
    for folder in (path, path / "raw", *sorted(path.glob("*/raw"))):  # the last two are where torchvision puts them
        matches = [(file, IDX_FILE.fullmatch(file.name)) for file in sorted(folder.glob("*"), reverse=True)]
        files = {match[2]: file for file, match in matches if match and match[1] == PREFIX.get(split)}
        if "images" in files:
            break
    else:
        return None
    if "labels" not in files:
        raise FileNotFoundError(f"{files['images'].parent}: images without their labels file (...-labels-idx1-ubyte)")
    images, labels = read_idx(files["images"], 3), read_idx(files["labels"], 1).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{files['images']}: {len(images)} images but {len(labels)} labels: files of different sets")
    fashion = "fashion" in str(files["images"].resolve()).lower()
    classes = CLOTHES.split(", ") if fashion else [str(label) for label in range(int(labels.max(initial=0)) + 1)]
    name = "fashion-mnist" if fashion else plain_name(path)
    notes = (f"IDX files in {files['images'].parent}",)
    return Source("idx", name, Catalogue.of_pixels(images, labels.tolist()), tuple(classes), notes=notes)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a file of uint8: 0, 0, 8, dimensions; big-endian sizes; values (yann.lecun.com/exdb/mnist). Raises ValueError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content, start = file.read(MAX_UNPACKED), 4 + 4 * dimensions
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"begins with {content[:4]!r}")
        shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        kind = f"a whole IDX file of {dimensions} dimensions of uint8"
        raise ValueError(f"{path}: not {kind} ({error}): download it again") from None
