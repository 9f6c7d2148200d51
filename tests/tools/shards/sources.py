"""Small true copies of every layout that `make_shards` reads, each with images whose pixels tell their label."""

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.imagenet import ARCHIVE_META

WNIDS = ("n01440764", "n02119789", "n02105855")  # labels 0, 278 and 230 of the usual 1000
WNID_LABELS = {"n01440764": 0, "n02119789": 278, "n02105855": 230}


def picture(label: int, number: int, height: int = 40, width: int = 56, image_format: str = "JPEG") -> bytes:
    """One colour for the label, with a little structure that differs from image to image."""
    rng = np.random.default_rng([label, number])
    pixels = np.full((height, width, 3), (label * 37 % 256, 255 - label * 11 % 256, 90), np.int16)
    coarse = rng.integers(-12, 13, (-(-height // 8), -(-width // 8), 1)).astype(np.int16)
    pixels += coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, image_format, quality=92)
    return out.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def class_folders(root: Path, per_class: int = 8, classes: Iterable[str] = ("ant", "bee", "cat")) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            (root / name / f"{name}.{number}.JPEG").write_bytes(picture(label, number))
    return root


def imagenet_archives(root: Path, patch: pytest.MonkeyPatch | None = None) -> Path:
    """The train tar of class tars, the val tar, and a devkit whose IDs are not in wnid order.

    With `patch`, publishes the devkit's checksum in place of that of the original one.
    """
    root.mkdir()
    inner = []
    for wnid in WNIDS:
        images = [(f"{wnid}_{n}.JPEG", picture(WNID_LABELS[wnid], n)) for n in range(5)]
        inner.append((f"{wnid}.tar", tar_bytes(images)))
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    truth = [2, 3, 1, 1, 2]  # ILSVRC2012_IDs; ID i is the wnid ID_ORDER[i - 1]
    val = [(f"ILSVRC2012_val_{n:08d}.JPEG", picture(WNID_LABELS[ID_ORDER[i - 1]], n)) for n, i in enumerate(truth, 1)]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    folder = "ILSVRC2012_devkit_t12/data"
    lines = "".join(f"{i}\n" for i in truth).encode()
    devkit = [(f"{folder}/meta.mat", meta_mat()), (f"{folder}/ILSVRC2012_validation_ground_truth.txt", lines)]
    content = tar_bytes(devkit, "w:gz")
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(content)
    if patch:
        patch.setitem(ARCHIVE_META, "devkit", ("ILSVRC2012_devkit_t12.tar.gz", hashlib.md5(content).hexdigest()))
    return root


ID_ORDER = ("n02119789", "n01440764", "n02105855")


def meta_mat() -> bytes:
    """The devkit's struct array as SciPy (and MATLAB) write it, with an inner node of the tree that is no class."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"), ("children", "O")]
    rows = [(float(i), wnid, "a fish, tench", "a fish", 0.0, np.zeros((0,))) for i, wnid in enumerate(ID_ORDER, 1)]
    rows.append((4.0, "n00001740", "entity", "all", 2.0, np.array([1.0, 2.0])))
    out = io.BytesIO()
    savemat(out, {"synsets": np.array(rows, fields).reshape(-1, 1)}, do_compression=True)
    return out.getvalue()


def kaggle_tree(root: Path) -> Path:
    data = root / "ILSVRC/Data/CLS-LOC"
    for wnid in WNIDS:
        (data / "train" / wnid).mkdir(parents=True)
        for n in range(4):
            (data / "train" / wnid / f"{wnid}_{n}.JPEG").write_bytes(picture(sorted(WNIDS).index(wnid), n))
    (data / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for n, wnid in enumerate(ID_ORDER, 1):
        (data / "val" / f"ILSVRC2012_val_{n:08d}.JPEG").write_bytes(picture(sorted(WNIDS).index(wnid), n))
        lines.append(f"ILSVRC2012_val_{n:08d},{wnid} 111 108 441 193 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} some, words\n" for wnid in sorted(WNIDS)))
    return root


def cifar_archive(root: Path, hundred: bool, patch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray, list[int]]:
    """Five batches (CIFAR-100: one file) of four images; returns the archive, the pixels `[N, 32, 32, 3]`, the labels.

    Publishes its checksums in place of those of the original archive.
    """
    root.mkdir(exist_ok=True)
    rng, dataset = np.random.default_rng(5), CIFAR100 if hundred else CIFAR10
    num_files, num_classes = (1, 100) if hundred else (5, 10)
    images = rng.integers(0, 256, (num_files * 4, 32, 32, 3), np.uint8)
    labels = rng.integers(0, num_classes, num_files * 4).tolist()
    names = [f"class_{i}" for i in range(num_classes)]
    members = []
    for k in range(num_files):
        planes = images[4 * k : 4 * k + 4].transpose(0, 3, 1, 2).reshape(4, -1)
        mine = labels[4 * k : 4 * k + 4]
        base = "train" if hundred else f"data_batch_{k + 1}"
        key = "fine_labels" if hundred else "labels"
        members.append((base, pickle.dumps({"data": planes, key: mine, "batch_label": "x"}, protocol=2)))
    sums = [[name, hashlib.md5(content).hexdigest()] for name, content in members]
    meta = pickle.dumps({dataset.meta["key"]: names}, protocol=2)
    test = dataset.test_list[0][0]
    members += [(test, members[0][1]), (dataset.meta["filename"], meta)]
    patch.setattr(dataset, "train_list", sums)
    patch.setattr(dataset, "test_list", [[test, sums[0][1]]])
    patch.setattr(dataset, "meta", {**dataset.meta, "md5": hashlib.md5(meta).hexdigest()})
    path = root / f"cifar-{100 if hundred else 10}-python.tar.gz"
    path.write_bytes(tar_bytes([(f"{dataset.base_folder}/{name}", content) for name, content in members], "w:gz"))
    patch.setattr(dataset, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path, images, labels


def idx_files(root: Path, zipped: bool) -> tuple[Path, np.ndarray, list[int]]:
    root.mkdir(parents=True)
    rng = np.random.default_rng(6)
    images, labels = rng.integers(0, 256, (12, 28, 28), np.uint8), rng.integers(0, 10, 12).astype(np.uint8)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        content = head + array.tobytes()
        path = root / f"train-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return root, images, labels.tolist()
