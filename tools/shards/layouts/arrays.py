"""Data sets of raw pixels: CIFAR-10 and CIFAR-100 archives, and MNIST-style IDX files. Stored losslessly as PNG."""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from tools.shards.archives import read_maybe_gzip, read_tgz
from tools.shards.catalogue import Catalogue, ImageArray, Source, check_class_names
from tools.shards.layouts.folders import plain_name

CIFAR_ARCHIVE = re.compile(r"cifar-(10|100)-(binary|python)\.tar\.gz")
CIFAR_PIXELS = 3 * 32 * 32
IDX_FILE = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
FASHION_MNIST = [
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]


def find_cifar(path: Path, split: str) -> str:
    archive = _cifar_archive(path)
    return archive.name if archive else ""


def _cifar_archive(path: Path) -> Path | None:
    """The archive; of two in one folder the binary one, which needs no unpickling."""
    candidates = [path] if path.is_file() else sorted(path.glob("cifar-*.tar.gz"))
    return next((file for file in candidates if CIFAR_ARCHIVE.fullmatch(file.name)), None)


def open_cifar(path: Path, split: str, work: Path | None) -> Source:
    archive = _cifar_archive(path)
    match = CIFAR_ARCHIVE.fullmatch(archive.name) if archive else None
    assert archive is not None
    assert match is not None
    hundred, binary = match[1] == "100", match[2] == "binary"
    wanted = _cifar_files(hundred, binary, split)
    found = read_tgz(archive, lambda name: name in wanted or name in CIFAR_META)
    batches = [name for name in wanted if name in found]
    if not batches:
        raise ValueError(
            f"{archive}: holds none of {', '.join(wanted)}: wrong archive, or --split {split} is not in it"
        )
    read = _binary_batch if binary else _python_batch
    parts = [read(found[name], hundred, f"{archive}: {name}") for name in batches]
    labels = np.concatenate([labels for _, labels in parts])
    classes = _cifar_classes(found, hundred, binary, f"{archive}")
    notes = (f"{archive.name}, read {'as plain bytes' if binary else 'with an unpickler that admits arrays only'}",)
    name = f"cifar{match[1]}"
    return _array_source("cifar", name, np.concatenate([images for images, _ in parts]), labels, classes, notes)


CIFAR_META = ("batches.meta.txt", "batches.meta", "fine_label_names.txt", "meta")


def _cifar_files(hundred: bool, binary: bool, split: str) -> list[str]:
    ending = ".bin" if binary else ""
    if hundred:
        return [f"{'train' if split == 'train' else 'test'}{ending}"]
    return [f"data_batch_{i}{ending}" for i in range(1, 6)] if split == "train" else [f"test_batch{ending}"]


def _binary_batch(content: bytes, hundred: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte (CIFAR-100: coarse, then fine) and 3 planes of 32x32."""
    head = 2 if hundred else 1
    if not content or len(content) % (head + CIFAR_PIXELS):
        raise ValueError(f"{where}: {len(content)} bytes are not records of {head + CIFAR_PIXELS}: download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, head + CIFAR_PIXELS)
    return _planes_last(records[:, head:]), records[:, head - 1].astype(np.int64)


def _python_batch(content: bytes, hundred: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_arrays(content, where)
    data, labels = batch.get("data"), batch.get("fine_labels" if hundred else "labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (CIFAR_PIXELS,):
        raise ValueError(f"{where}: `data` is not [N, {CIFAR_PIXELS}] uint8: wrong archive")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(isinstance(label, int) for label in labels):
        raise ValueError(f"{where}: the labels are not one number per image: wrong archive")
    return _planes_last(data), np.array(labels, np.int64)


def _planes_last(data: np.ndarray) -> np.ndarray:
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _cifar_classes(found: dict[str, bytes], hundred: bool, binary: bool, where: str) -> list[str]:
    if binary:
        classes = found.get("fine_label_names.txt" if hundred else "batches.meta.txt", b"").decode().split()
    else:
        meta = found.get("meta" if hundred else "batches.meta")
        key = "fine_label_names" if hundred else "label_names"
        classes = [str(name) for name in load_arrays(meta, where).get(key, [])] if meta else []
    check_class_names(classes, where)
    return classes


class _Marker:
    """Stands for numpy.ndarray inside a pickle; cannot be called."""


class ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and integer arrays; refuses every other name a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): _Marker,
            ("numpy", "dtype"): _integer_dtype,
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("_codecs", "encode"): _latin1_bytes,
        }
        if (module, name) not in allowed:
            raise ValueError(f"asks for {module}.{name}, allowed are integer arrays only")
        return allowed[module, name]


def _empty_array(*_: object) -> np.ndarray:
    return np.empty((0,), np.uint8)


def _integer_dtype(code: str, *_: object) -> np.dtype:
    if code not in ("u1", "i1", "i4", "i8"):
        raise ValueError(f"holds an array of {code!r}, allowed are integers")
    return np.dtype(code)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"uses the text encoding {encoding!r}")
    return text.encode("latin1")


def load_arrays(content: bytes, where: str) -> dict[str, Any]:
    """A pickled dictionary of arrays and lists, read without running anything the pickle names."""
    try:
        value = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        EOFError,
        IndexError,
        KeyError,
        AttributeError,
        MemoryError,
    ) as error:
        raise ValueError(f"{where}: not a plain CIFAR pickle ({error}): wrong archive, or tampered with") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, not a dictionary: wrong archive")
    return value


def find_idx(path: Path, split: str) -> str:
    pair = _idx_pair(path, split)
    return f"{pair['images'].name}" if pair else ""


def _idx_pair(path: Path, split: str) -> dict[str, Path]:
    """Images and labels of a split, in the folder itself or where torchvision puts them (`raw`, `NAME/raw`)."""
    prefix = "train" if split == "train" else "t10k"
    for folder in (path, path / "raw", *sorted(path.glob("*/raw"))):
        if not folder.is_dir():
            continue
        matches = [(file, IDX_FILE.fullmatch(file.name)) for file in sorted(folder.iterdir(), reverse=True)]
        pair = {match[2]: file for file, match in matches if match and match[1] == prefix}
        if "images" in pair:
            return pair
    return {}


def open_idx(path: Path, split: str, work: Path | None) -> Source:
    pair = _idx_pair(path, split)
    if "labels" not in pair:
        raise FileNotFoundError(f"{pair['images'].parent}: images without their labels file (...-labels-idx1-ubyte)")
    images, labels = read_idx(pair["images"], 3), read_idx(pair["labels"], 1)
    if len(images) != len(labels):
        raise ValueError(f"{pair['images']}: {len(images)} images but {len(labels)} labels: files of different sets")
    fashion = "fashion" in str(pair["images"].resolve()).lower()
    classes = FASHION_MNIST if fashion else [str(label) for label in range(int(labels.max(initial=0)) + 1)]
    name = "fashion-mnist" if fashion else plain_name(path)
    return _array_source(
        "idx", name, images, labels.astype(np.int64), classes, (f"IDX files in {pair['images'].parent}",)
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The IDX format of yann.lecun.com/exdb/mnist: magic 0, 0, 8 (uint8), dimensions; big-endian sizes; bytes."""
    content = read_maybe_gzip(path)
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise ValueError(f"{path}: no IDX file of {dimensions} dimensions of uint8: download it again")
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path}: {len(content) - start} bytes of data for shape {shape}: truncated, download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _array_source(
    layout: str, name: str, images: np.ndarray, labels: np.ndarray, classes: list[str], notes: tuple[str, ...]
) -> Source:
    if classes and len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"{name}: labels {labels.min()}..{labels.max()} for {len(classes)} classes: wrong archive")
    catalogue = Catalogue([ImageArray(images)])
    for row, label in enumerate(labels.tolist()):
        catalogue.add(0, row, math.prod(images.shape[1:]), label, f"{row:06d}")
    return Source(layout, name, catalogue, tuple(classes), notes=notes)
