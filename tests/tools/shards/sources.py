"""Small true copies of every layout that `make_shards` reads, each with images whose pixels tell their label."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

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


def imagenet_archives(root: Path) -> Path:
    """The train tar of class tars, the val tar, and a devkit whose IDs are not in wnid order."""
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
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(devkit, "w:gz"))
    return root


ID_ORDER = ("n02119789", "n01440764", "n02105855")


def meta_mat() -> bytes:
    """The devkit's struct array as SciPy (and MATLAB) write it, with an inner node of the tree that is no class."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("children", "O")]
    rows = [(float(i), wnid, "a fish, tench", 0.0, np.zeros((0,))) for i, wnid in enumerate(ID_ORDER, 1)]
    rows.append((4.0, "n00001740", "entity", 2.0, np.array([1.0, 2.0])))
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


def cifar_archive(root: Path, hundred: bool) -> tuple[Path, np.ndarray, list[int]]:
    """Five batches (CIFAR-100: one file) of four images; returns the archive, the pixels `[N, 32, 32, 3]`, the labels."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
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
        members.append((f"c/{base}", pickle.dumps({"data": planes, key: mine, "batch_label": "x"}, protocol=2)))
    meta = pickle.dumps({"fine_label_names" if hundred else "label_names": names}, protocol=2)
    members.append(("c/meta" if hundred else "c/batches.meta", meta))
    path = root / f"cifar-{100 if hundred else 10}-python.tar.gz"
    path.write_bytes(tar_bytes(members, "w:gz"))
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
