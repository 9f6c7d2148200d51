"""The files next to the tars of a finished split: index, manifest, rejected images."""

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_atomic
from pipeline.lock import locked
from pipeline.shards.index_file import index_files
from pipeline.shards.manifest import MANIFEST_NAME, read_manifest
from pipeline.text import truncate_list
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER, Conversion, ShardRecord

REJECTED_NAME = "rejected.jsonl"
FORMAT_VERSION = 1


class StoredSplit:
    """The images of a split whose shards are complete, from their records. `rows`: `[n]` of SAMPLE_DTYPE."""

    def __init__(self, folder: Path, shards: list[str], classes: tuple[str, ...]) -> None:
        self.folder, self.shards, self.classes = folder, shards, classes
        self.records = [ShardRecord.load(folder / RECORD_FOLDER / f"{shard:06d}.npz") for shard in range(len(shards))]
        self.rows = np.concatenate([record.rows for record in self.records])
        self.digests = np.concatenate([record.digests for record in self.records])
        self.one_colour = [name for record in self.records for name in record.one_colour]
        self.changes = sum((Counter(record.changes) for record in self.records), Counter())

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes else str(label)


def finish_split(conversion: Conversion, split: str, seed: int) -> tuple[bool, int]:
    """Write the files next to the tars from the shards' records.

    Returns True if one of them had to be written, and the number of rejected images.
    """
    folder = conversion.folder
    with locked(folder / RECORD_FOLDER / "lock"):  # several tasks of a job array can find the last shard done at once
        names = [conversion.shard_name(shard) for shard in range(conversion.num_shards)]
        stored = StoredSplit(folder, names, conversion.source.classes)
        if len(stored.rows) == 0:
            raise ValueError(f"{folder}: every image was rejected, see {RECORD_FOLDER}")
        # All shards are complete, so no process is writing any more: these are left from killed runs.
        for partial in (*folder.glob(".*.partial"), *(folder / RECORD_FOLDER).glob(".*.partial")):
            partial.unlink(missing_ok=True)
        rejected = [bad for record in stored.records for bad in record.rejected]
        files = index_files({name: len(record.rows) for name, record in zip(names, stored.records, strict=True)}, stored.rows)
        manifest = json.dumps(_manifest(conversion, split, seed, stored), indent=1, ensure_ascii=False) + "\n"
        files[MANIFEST_NAME] = manifest.encode("utf-8", "backslashreplace")
        if rejected:
            files[REJECTED_NAME] = "".join(json.dumps(bad) + "\n" for bad in rejected).encode()
        else:
            (folder / REJECTED_NAME).unlink(missing_ok=True)
        # A finished split keeps its files untouched, so that a second run can say that there was nothing to do.
        changed = False
        for name, content in files.items():
            path = folder / name
            if not path.exists() or path.read_bytes() != content:
                write_atomic(path, content)
                changed = True
        return changed, len(rejected)


def _manifest(conversion: Conversion, split: str, seed: int, stored: StoredSplit) -> dict[str, Any]:
    source, policy, records = conversion.source, conversion.policy, stored.records
    return {
        "format_version": FORMAT_VERSION,
        "tool": f"multicrop-hjepa {version('multicrop-hjepa')}",
        "name": source.name,
        "split": split,
        "layout": source.layout,
        "seed": seed,
        "verify": policy.verify,
        "resize": policy.resize,
        "quality": policy.quality if policy.resize else None,
        "num_samples": sum(len(record.rows) for record in records),
        "num_rejected": sum(len(record.rejected) for record in records),
        "num_bytes": sum(record.num_bytes for record in records),
        "changes": dict(sorted(stored.changes.items())),
        "classes": list(source.classes),
        "class_names": list(source.class_names),
        "attributions": list(source.attributions),
        "shards": [
            {"name": name, "sha256": record.sha256, "bytes": record.num_bytes, "samples": len(record.rows)}
            for name, record in zip(stored.shards, records, strict=True)
        ],
    }


def equal_groups(digests: np.ndarray) -> list[list[int]]:
    """Return the groups of equal digests, each as its places."""
    _, group_of, counts = np.unique(digests, return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for place in np.flatnonzero(counts[group_of] > 1).tolist():
        groups.setdefault(group_of[place], []).append(place)
    return list(groups.values())


def remarks(out: Path) -> list[str]:
    """Return a line on each thing in the finished splits that a person should know: changes, degenerate images and labels."""
    folders = [out / split for split in ("train", "val") if (out / split / RECORD_FOLDER / IDENTITY_NAME).exists()]
    manifests = {folder: manifest for folder in folders if (manifest := read_manifest(folder))}
    splits = [StoredSplit(folder, list(manifest.checksums), manifest.classes) for folder, manifest in manifests.items()]
    owner = np.repeat(np.arange(len(splits)), [len(stored.rows) for stored in splits])
    equal = equal_groups(np.concatenate([stored.digests for stored in splits]))
    groups, lines = [owner[places].tolist() for places in equal], []
    for number, stored in enumerate(splits):
        split, total, flat = stored.folder.name, len(stored.rows), stored.one_colour
        changes = ", ".join(f"{count:,} {kind}" for kind, count in stored.changes.most_common())
        copies = sum(max(group.count(number) - 1, 0) for group in groups)
        in_train = sum(group.count(number) for group in groups if 0 in group and number > 0)
        labels, counts = np.unique(stored.rows["label"], return_counts=True)
        single = [stored.class_name(label) for label in labels[(counts == 1) & (labels >= 0)].tolist()]
        texts = {
            f"changed by the rules of docs/pipeline.md: {changes}": changes,
            f"{len(flat):,} of {total:,} images have one colour: {truncate_list(flat)}": flat,
            f"{copies:,} of {total:,} images are copies of others": copies,
            f"{in_train:,} of {total:,} images are also in train, which flatters accuracies": in_train,
            f"classes with a single image: {truncate_list(single)}": single and split == "train",
            "all images have one label, so accuracies will mean nothing": len(labels) == 1 and labels[0] >= 0,
        }
        lines += [f"{split}: {text}" for text, applies in texts.items() if applies]
    return lines
