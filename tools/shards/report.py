"""The files next to the tars of a finished split: index, manifest, rejected images."""

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_atomic
from pipeline.shards.index_file import index_files
from pipeline.shards.manifest import MANIFEST_NAME, read_manifest
from pipeline.text import truncate_list
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER, Conversion, ShardRecord

REJECTED_NAME, COPIES_NAME = "rejected.jsonl", "copies.jsonl"


def finish_split(conversion: Conversion) -> tuple[bool, int]:
    """Write the files next to the tars; returns True if one had to be written, and the number of rejected images."""
    folder = conversion.folder
    records = [ShardRecord.load(conversion.record_path(shard)) for shard in conversion.shards]
    rows = np.concatenate([record.rows for record in records])
    if len(rows) == 0:
        raise ValueError(f"{folder}: every image was rejected, see {RECORD_FOLDER}")
    # All shards are complete, so no process is writing any more: these are left from killed runs.
    for partial in (*folder.glob(".*.partial"), *(folder / RECORD_FOLDER).glob(".*.partial")):
        partial.unlink(missing_ok=True)
    rejected = [bad for record in records for bad in record.rejected]
    files = index_files({conversion.shard_path(shard).name: len(record.rows) for shard, record in enumerate(records)}, rows)
    manifest = json.dumps(_manifest(conversion, records), indent=1, ensure_ascii=False) + "\n"
    files[MANIFEST_NAME] = manifest.encode("utf-8", "backslashreplace")
    for name, lines in ((REJECTED_NAME, rejected), (COPIES_NAME, conversion.source.copies)):
        if lines:
            files[name] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        else:
            (folder / name).unlink(missing_ok=True)
    # A finished split keeps its files untouched, so that a second run can say that there was nothing to do.
    changed = [name for name, content in files.items() if not (path := folder / name).exists() or path.read_bytes() != content]
    for name in changed:
        write_atomic(folder / name, files[name])
    return bool(changed), len(rejected)


def _manifest(conversion: Conversion, records: list[ShardRecord]) -> dict[str, Any]:
    source, policy = conversion.source, conversion.policy
    return {
        "format_version": 1,
        "tool": f"multicrop-hjepa {version('multicrop-hjepa')}",
        "name": source.name,
        "split": conversion.split,
        "layout": source.layout,
        "seed": conversion.seed,
        "verify": policy.verify,
        "resize": policy.resize,
        "quality": policy.quality if policy.resize else None,
        "num_samples": sum(len(record.rows) for record in records),
        "num_rejected": sum(len(record.rejected) for record in records),
        "changes": dict(sorted(_all_changes(records).items())),
        "classes": list(source.classes),
        "attributions": list(source.attributions),
        "shards": [
            {"name": conversion.shard_path(shard).name, "sha256": r.sha256, "bytes": r.num_bytes, "samples": len(r.rows)}
            for shard, r in enumerate(records)
        ],
    }


def _all_changes(records: list[ShardRecord]) -> Counter[str]:
    return sum((Counter(record.changes) for record in records), Counter())


def remarks(out: Path) -> list[str]:
    """Return a line on each thing in the finished splits that a person should know: changes, degenerate images and labels."""
    lines, in_train = list[str](), np.empty(0, "S16")
    for split in ("train", "val"):
        records_folder = out / split / RECORD_FOLDER
        manifest = read_manifest(out / split) if (records_folder / IDENTITY_NAME).exists() else None
        if manifest is None:
            continue
        records = [ShardRecord.load(records_folder / f"{shard:06d}.npz") for shard in range(len(manifest.shards))]
        digests = np.concatenate([record.digests for record in records])
        labels, counts = np.unique(np.concatenate([record.rows["label"] for record in records]), return_counts=True)
        total, flat = f"{len(digests):,}", [name for record in records for name in record.one_colour]
        changes = ", ".join(f"{count:,} {kind}" for kind, count in _all_changes(records).most_common())
        copies, shared = len(digests) - len(np.unique(digests)), int(np.isin(digests, in_train).sum())
        single = [manifest.classes[n] if manifest.classes else str(n) for n in labels[(counts == 1) & (labels >= 0)].tolist()]
        texts = {
            f"changed by the rules of docs/pipeline.md: {changes}": changes,
            f"{len(flat):,} of {total} images have one colour: {truncate_list(flat)}": flat,
            f"{copies:,} of {total} images are copies of others": copies,
            f"{shared:,} of {total} images are also in train, which flatters accuracies": shared,
            f"classes with a single image: {truncate_list(single)}": single and split == "train",
            "all images have one label, so accuracies will mean nothing": len(labels) == 1 and labels[0] >= 0,
        }
        lines += [f"{split}: {text}" for text, applies in texts.items() if applies]
        in_train = digests
    return lines
