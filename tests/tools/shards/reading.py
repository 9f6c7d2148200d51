"""Read finished shards back by the plainest means: tarfile."""

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tools.make_shards import main


class Stored(NamedTuple):
    key: str
    extension: str
    content: bytes
    label: int
    name: str

    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.content)).convert("RGB"))


def stored_samples(folder: Path) -> list[Stored]:
    samples = []
    for path in sorted(folder.glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                parts.setdefault(key, {})[extension] = file.read()
        for key, fields in parts.items():
            extension = "jpg" if "jpg" in fields else "png"
            label = int(fields.get("cls", b"-1"))
            samples.append(Stored(key, extension, fields[extension], label, json.loads(fields["json"])["name"]))
    return samples


def run_convert(source: Path, out: Path, *options: str) -> Path:
    """Convert in this process; returns the folder of the split."""
    assert main(["convert", str(source), "--out", str(out), "--workers", "1", *options]) == 0
    return out / ("val" if "val" in options else "train")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below the folder except lock files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock")
    }


def colour_of(label: int) -> np.ndarray:
    return np.array([label * 37 % 256, 255 - label * 11 % 256, 90])


def assert_colours_tell_labels(folder: Path, expected: int) -> list[int]:
    samples = stored_samples(folder)
    assert len(samples) == expected
    for sample in samples:
        assert np.abs(sample.pixels().mean((0, 1)) - colour_of(sample.label)).max() < 12, sample.name
    return sorted({sample.label for sample in samples})
