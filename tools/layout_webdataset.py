"""Existing WebDatasets, whoever wrote them: tars of images with `cls` or `json` labels."""

import json
from pathlib import Path

from pipeline.index import UNLABELLED
from tools.catalogue import Catalogue, FileRanges, Source
from tools.layout_folders import EXTENSIONS, plain_name, split_root
from tools.tar_members import TarMember, is_tar, tar_members

MAX_LABEL_BYTES = 1 << 20


def find_webdataset(path: Path, split: str) -> str:
    tars = _tars(path, split)
    return f"{len(tars)} tars" if tars and is_tar(tars[0]) else ""


def _tars(path: Path, split: str) -> list[Path]:
    """One tar, or the tars of a folder; where some are named after the split, only those."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    root = split_root(path, split)
    tars = sorted(root.glob("*.tar")) if root else []
    aliases = {"val": ("val", "validation")}.get(split, (split,))
    return [tar for tar in tars if any(alias in tar.name for alias in aliases)] or tars


def open_webdataset(path: Path, split: str, work: Path | None) -> Source:
    """The label is a `cls` member, or `label` in a `json` member. Members of one sample need not be adjacent."""
    tars = _tars(path, split)
    catalogue = Catalogue([FileRanges(tar) for tar in tars])
    for container, tar in enumerate(tars):
        images: dict[str, TarMember] = {}
        labels: dict[str, int] = {}
        reader = FileRanges(tar)
        for member in tar_members(tar):
            stem, _, extension = member.name.rpartition(".")
            if f".{extension.lower()}" in EXTENSIONS:
                if stem in images:
                    raise ValueError(f"{tar}: two images with the key {stem!r}: re-key or remove one of them")
                images[stem] = member
            elif extension.lower() in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                label = _label(reader.read(member.offset, member.size, member.name), extension.lower(), tar, member)
                if label is not None and (extension.lower() == "cls" or stem not in labels):
                    labels[stem] = label
        for stem, image in images.items():
            catalogue.add(container, image.offset, image.size, labels.get(stem, UNLABELLED), image.name)
    name, classes = _manifest(tars[0].parent, plain_name(path).removesuffix("-tar"))
    return Source("webdataset", name, catalogue, classes, notes=(f"{len(tars)} tars",))


def _manifest(folder: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Name and classes as one of our own manifests gives them."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else {}
        return str(manifest.get("name", name)), tuple(str(item) for item in manifest.get("classes", ()))
    except (ValueError, AttributeError):
        return name, ()


def _label(content: bytes, extension: str, tar: Path, member: TarMember) -> int | None:
    try:
        value = int(content) if extension == "cls" else json.loads(content)
        if isinstance(value, dict):
            value = value.get("label")
        return value if isinstance(value, int) and -(1 << 31) <= value < 1 << 31 else None
    except (ValueError, RecursionError):
        raise ValueError(
            f"{tar}: {member.name} at byte {member.offset} is no label: cls holds a number, json an object"
        ) from None
