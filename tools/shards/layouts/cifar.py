"""CIFAR-10 and CIFAR-100 as downloaded, the archives of the Python version, stored losslessly as PNG."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from tools.shards.catalogue import Catalogue, Source
from tools.shards.layouts.archives import read_tgz

ARCHIVE = re.compile(r"cifar-(10|100)-python\.tar\.gz")
PIXELS = 3 * 32 * 32
BATCHES = {  # by number of classes, in the order of train and val
    "10": {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]},
    "100": {"train": ["train"], "val": ["test"]},
}
# The file of the classes, its key, and the key of the labels.
KEYS = {"10": ("batches.meta", "label_names", "labels"), "100": ("meta", "fine_label_names", "fine_labels")}
UNPICKLING_ERRORS = (
    AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError, pickle.UnpicklingError,
)  # fmt: skip


def open_cifar(path: Path, split: str, spools: Path | None) -> Source | None:
    candidates = [path] if path.is_file() else sorted(path.glob("cifar-*.tar.gz"))
    archive = next((file for file in candidates if ARCHIVE.fullmatch(file.name)), None)
    if archive is None:
        return None
    number, where = archive.name.split("-")[1], str(archive)
    names, (class_file, class_key, label_key) = BATCHES[number][split], KEYS[number]
    files = read_tgz(archive, {*names, class_file})
    parts = [_read_pickle(files[name], label_key, f"{archive}: {name}") for name in names if name in files]
    if not parts:
        raise ValueError(f"{archive}: holds none of {', '.join(names)}: wrong archive, or --split {split} is not in it")
    classes = tuple(map(str, load_arrays(files[class_file], where).get(class_key, []))) if class_file in files else ()
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    catalogue = Catalogue.of_pixels(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.tolist())
    note = f"{archive.name}, read with an unpickler that allows only arrays"
    return Source("cifar", f"cifar{number}", catalogue, classes, notes=(note,))


def _read_pickle(content: bytes, label_key: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_arrays(content, where)
    data, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
        raise ValueError(f"{where}: `data` is not [N, {PIXELS}] uint8: wrong archive")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(label in range(100) for label in labels):
        raise ValueError(f"{where}: the labels are not one number of 0..99 per image: wrong archive")
    return data, np.array(labels, np.int64)


def load_arrays(content: bytes, where: str) -> dict[str, Any]:
    """Read a pickled dictionary of arrays and lists without running anything that the pickle names.

    Raises ValueError for any other content.
    """
    try:
        value = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"{where}: not a plain CIFAR pickle ({error}): wrong archive, or tampered with") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, not a dictionary: wrong archive")
    return value


class ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and integer arrays; refuses every other name that a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "numpy.ndarray": object(),  # an argument of _reconstruct, never called
            "numpy.dtype": _integer_dtype,
            "numpy.core.multiarray._reconstruct": lambda *_: np.empty((0,), np.uint8),
            "numpy._core.multiarray._reconstruct": lambda *_: np.empty((0,), np.uint8),
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how Python 3 pickles bytes
        }
        if f"{module}.{name}" not in allowed:
            raise ValueError(f"asks for {module}.{name}, but only integer arrays are allowed")
        return allowed[f"{module}.{name}"]


def _integer_dtype(code: str, *_: object) -> np.dtype:
    if code not in ("u1", "i1", "i4", "i8"):
        raise ValueError(f"holds an array of {code!r}, but only integers are allowed")
    return np.dtype(code)
