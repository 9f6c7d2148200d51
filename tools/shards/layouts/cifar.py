"""CIFAR-10 and CIFAR-100 archives, binary or Python version. Stored losslessly as PNG."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from tools.shards.archives import read_tgz
from tools.shards.catalogue import Catalogue, Source, check_class_names, check_labels

ARCHIVE = re.compile(r"cifar-(10|100)-(binary|python)\.tar\.gz")
PIXELS = 3 * 32 * 32
META_FILES = ("batches.meta.txt", "batches.meta", "fine_label_names.txt", "meta")


def open_cifar(path: Path, split: str, spools: Path | None) -> Source | None:
    """Of two archives in one folder the binary one, which needs no unpickling."""
    candidates = [path] if path.is_file() else sorted(path.glob("cifar-*.tar.gz"))
    found = next(((file, match) for file in candidates if (match := ARCHIVE.fullmatch(file.name))), None)
    if found is None:
        return None
    archive, match = found
    hundred, binary = match[1] == "100", match[2] == "binary"
    wanted = _batch_names(hundred, binary, split)
    files = read_tgz(archive, lambda name: name in wanted or name in META_FILES)
    batches = [name for name in wanted if name in files]
    if not batches:
        names = ", ".join(wanted)
        raise ValueError(f"{archive}: holds none of {names}: wrong archive, or --split {split} is not in it")
    read = _binary_batch if binary else _python_batch
    parts = [read(files[name], hundred, f"{archive}: {name}") for name in batches]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    classes = _class_names(files, hundred, binary, str(archive))
    check_labels(labels, classes, str(archive))
    catalogue = Catalogue.of_pixels(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.tolist())
    note = f"{archive.name}, read {'as plain bytes' if binary else 'with an unpickler that allows only arrays'}"
    return Source("cifar", f"cifar{match[1]}", catalogue, tuple(classes), notes=(note,))


def _batch_names(hundred: bool, binary: bool, split: str) -> list[str]:
    ending = ".bin" if binary else ""
    if hundred:
        return [f"{'train' if split == 'train' else 'test'}{ending}"]
    return [f"data_batch_{i}{ending}" for i in range(1, 6)] if split == "train" else [f"test_batch{ending}"]


def _binary_batch(content: bytes, hundred: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte (CIFAR-100: coarse, then fine) and 3 planes of 32x32."""
    head = 2 if hundred else 1
    if not content or len(content) % (head + PIXELS):
        raise ValueError(f"{where}: {len(content)} bytes are not records of {head + PIXELS}: download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, head + PIXELS)
    return records[:, head:], records[:, head - 1].astype(np.int64)


def _python_batch(content: bytes, hundred: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_arrays(content, where)
    data, labels = batch.get("data"), batch.get("fine_labels" if hundred else "labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
        raise ValueError(f"{where}: `data` is not [N, {PIXELS}] uint8: wrong archive")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(isinstance(label, int) for label in labels):
        raise ValueError(f"{where}: the labels are not one number per image: wrong archive")
    return data, np.array(labels, np.int64)


def _class_names(files: dict[str, bytes], hundred: bool, binary: bool, where: str) -> list[str]:
    if binary:
        classes = files.get("fine_label_names.txt" if hundred else "batches.meta.txt", b"").decode().split()
    else:
        meta = files.get("meta" if hundred else "batches.meta")
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
            raise ValueError(f"asks for {module}.{name}, but only integer arrays are allowed")
        return allowed[module, name]


def _empty_array(*_: object) -> np.ndarray:
    return np.empty((0,), np.uint8)


def _integer_dtype(code: str, *_: object) -> np.dtype:
    if code not in ("u1", "i1", "i4", "i8"):
        raise ValueError(f"holds an array of {code!r}, but only integers are allowed")
    return np.dtype(code)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"uses the text encoding {encoding!r}")
    return text.encode("latin1")


def load_arrays(content: bytes, where: str) -> dict[str, Any]:
    """A pickled dictionary of arrays and lists, read without running anything the pickle names."""
    damage = (pickle.UnpicklingError, ValueError, TypeError, EOFError, LookupError, AttributeError, MemoryError)
    try:
        value = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except damage as error:
        raise ValueError(f"{where}: not a plain CIFAR pickle ({error}): wrong archive, or tampered with") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, not a dictionary: wrong archive")
    return value
