"""The shard index: where every sample lies, how large it is and what it is labelled."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

INDEX_NAME = "index.npz"
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
UNLABELLED = -1

# One row per sample. `offset` and `size` (bytes) span the encoded image inside the tar; height and width are pixels.
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("label", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one split, in stored order.

    `folder`: where the tars lie. `shards`: tar names relative to it. `samples`: `[N]` of SAMPLE_DTYPE, ordered by shard.
    """

    folder: Path
    shards: tuple[str, ...]
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def shard_path(self, shard: int) -> Path:
        return self.folder / self.shards[shard]

    def sizes(self) -> np.ndarray:
        """`[num_shards] int64`: the number of samples in each shard."""
        return np.bincount(self.samples["shard"], minlength=len(self.shards))

    def key(self, row: int) -> str:
        """The member name of one sample, read from its tar header."""
        sample = self.samples[row]
        with self.shard_path(sample["shard"]).open("rb") as file:
            file.seek(int(sample["offset"]) - tarfile.BLOCKSIZE)
            return tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name

    def encoded(self, row: int) -> bytes:
        """The image file of one sample."""
        sample = self.samples[row]
        with self.shard_path(sample["shard"]).open("rb") as file:
            file.seek(int(sample["offset"]))
            return file.read(int(sample["size"]))

    def decodes(self, row: int) -> bool:
        """Whether Pillow can decode one sample whole."""
        try:
            Image.open(io.BytesIO(self.encoded(row))).load()
        except (OSError, ValueError, SyntaxError):
            return False
        return True

    def describe(self, row: int) -> str:
        """One sample in words, for error lines: shard, member name and offset."""
        sample = self.samples[row]
        return f"{self.shard_path(sample['shard'])}: {self.key(row)} at byte {sample['offset']}"


def split_folder(dataset_name: str, data_path: Path | str, split: str) -> Path:
    """The folder with the shards of `split`: `data_path/split`, or `data_path` itself when it holds tars.

    Raises FileNotFoundError that names the command which makes the shards of `dataset_name`.
    """
    data_path = Path(data_path)
    for folder in (data_path / split, data_path):
        if any(folder.glob("*.tar")):
            return folder
    command = f"python tools/make_shards.py convert SOURCE --out {data_path} --split {split}"
    if dataset_name == "sample":
        command = f"python tools/make_shards.py sample --out {data_path}"
    raise FileNotFoundError(f"{data_path / split}: no {dataset_name} shards (*.tar) here. Make them with `{command}`")


def save_index(folder: Path, shards: list[str], samples: np.ndarray) -> None:
    """Write `folder/index.npz` beside and rename it. The same input gives the same bytes."""
    temporary = folder / f".{INDEX_NAME}.partial"
    with temporary.open("wb") as file:
        np.savez(file, shards=np.array(shards, dtype=np.str_), samples=samples.astype(SAMPLE_DTYPE))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / INDEX_NAME)


def open_index(folder: Path) -> ShardIndex:
    """Read `folder/index.npz`; a folder of tars without one is scanned, header by header.

    Raises FileNotFoundError when there are no shards, ValueError when a shard is missing or shorter than the index says.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        raise FileNotFoundError(
            f"{folder}: no shards (*.tar) here. Make them with `python tools/make_shards.py convert SOURCE --out {folder}`"
        )
    if not (folder / INDEX_NAME).exists():
        index = ShardIndex(
            folder, tuple(names), np.concatenate([scan_shard(folder / n, i) for i, n in enumerate(names)])
        )
    else:
        with np.load(folder / INDEX_NAME, allow_pickle=False) as file:
            index = ShardIndex(folder, tuple(str(name) for name in file["shards"]), file["samples"])
    check_index(index)
    return index


def check_index(index: ShardIndex) -> None:
    """Raise when the tars cannot be those the index was made for: one `stat` per shard and one header per shard."""
    samples = index.samples
    if len(samples) == 0:
        raise ValueError(
            f"{index.folder}: the index lists no samples. Convert again with `python tools/make_shards.py`"
        )
    ends = np.zeros(len(index.shards), np.int64)
    np.maximum.at(ends, samples["shard"], samples["offset"] + samples["size"])
    firsts = np.unique(samples["shard"], return_index=True)
    for shard, row in zip(*firsts, strict=True):
        path = index.shard_path(shard)
        if not path.exists():
            raise ValueError(f"{path}: listed in {INDEX_NAME} but missing. Copy it again or rebuild the index")
        size = path.stat().st_size
        if size < ends[shard]:
            raise ValueError(f"{path}: {size} bytes, the index needs {ends[shard]}: truncated, or of another data set")
        try:
            index.key(row)
        except tarfile.TarError as error:
            raise ValueError(
                f"{path}: no tar header where the index has a sample ({error}): foreign or damaged"
            ) from None


def scan_shard(path: Path, shard: int) -> np.ndarray:
    """Index one foreign WebDataset tar by its headers: `[n]` of SAMPLE_DTYPE.

    The image is the member whose extension is jpg, jpeg or png in any case; the label is a `cls` member, or `label` in a
    `json` member, or UNLABELLED. Members of one sample need not be adjacent. Raises ValueError for a tar without images.
    """
    images: dict[str, tuple[int, int, int, int]] = {}
    labels: dict[str, int] = {}
    for key, extension, offset, content in _members(path):
        if extension in IMAGE_EXTENSIONS:
            try:
                width, height = Image.open(io.BytesIO(content)).size
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {key}.{extension} at byte {offset} is not an image ({error})") from None
            images[key] = (offset, len(content), height, width)
        elif extension == "cls":
            labels[key] = int(content)
        elif extension == "json":
            label = json.loads(content).get("label")
            if isinstance(label, int):
                labels.setdefault(key, label)
    if not images:
        raise ValueError(f"{path}: no jpg, jpeg or png members: not a WebDataset of images")
    rows = [(shard, offset, size, labels.get(key, UNLABELLED), h, w) for key, (offset, size, h, w) in images.items()]
    return np.array(rows, SAMPLE_DTYPE)


def _members(path: Path) -> Iterator[tuple[str, str, int, bytes]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.rpartition(".")
                extension = extension.lower()
                if member.isreg() and extension in IMAGE_EXTENSIONS | {"cls", "json"}:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield f"{folder}/{stem}", extension, member.offset_data, file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable tar ({error})") from None
