"""The files beside the tars of a finished split: index, manifest, statistics, rejects, timm's info file."""

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards.index_file import OLD_INDEX_NAME, load_index, save_index
from pipeline.shards.manifest import MANIFEST_NAME
from tools.shards.writer import RECORD_FOLDER, Conversion, ShardRecord, write_file

STATS_NAME = "stats.json"
INFO_NAME = "_info.json"
REJECTED_NAME = "rejected.jsonl"
FORMAT_VERSION = 1
SIZE_EDGES = (0, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 1 << 31)


def finish_split(conversion: Conversion, split: str, seed: int) -> tuple[bool, int]:
    """Write every file beside the tars from the shards' records.

    Returns whether one of them had to be written, and the number of rejected images.
    """
    folder = conversion.folder
    with _lock(folder):
        records = [ShardRecord.load(conversion.record_path(shard)) for shard in range(conversion.num_shards)]
        names = [conversion.shard_name(shard) for shard in range(conversion.num_shards)]
        rows = np.concatenate([record.rows for record in records])
        if len(rows) == 0:
            raise ValueError(f"{folder}: every image was rejected, see {RECORD_FOLDER}")
        for partial in (*folder.glob(".*.partial"), *(folder / RECORD_FOLDER).glob(".*.partial")):
            partial.unlink(missing_ok=True)
        changed = _save_index_if_new(folder, names, rows)
        rejected = [bad for record in records for bad in record.rejected]
        fingerprints = np.concatenate([record.fingerprints for record in records])
        stats = describe_rows(rows, conversion.source.classes)
        stats["duplicates"] = find_duplicates(folder, names, rows, fingerprints)
        stats |= mean_and_std([np.concatenate(record.pixels) for record in records])
        files = {
            INFO_NAME: timm_info(conversion.source.name, split, names, [len(record.rows) for record in records]),
            MANIFEST_NAME: dump(_manifest(conversion, split, seed, names, records)),
            STATS_NAME: dump(stats),
        }
        if rejected:
            files[REJECTED_NAME] = "".join(json.dumps(bad) + "\n" for bad in rejected).encode()
        else:
            (folder / REJECTED_NAME).unlink(missing_ok=True)
        for name, content in files.items():
            path = folder / name
            if not path.exists() or path.read_bytes() != content:
                write_file(path, content)
                changed = True
        return changed, len(rejected)


def dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Several tasks of a job array may find the last shard done at once: one of them writes at a time."""
    with (folder / RECORD_FOLDER / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save_index_if_new(folder: Path, names: list[str], rows: np.ndarray) -> bool:
    """Compared by content, so that a damaged index is replaced."""
    try:
        shards, samples, _ = load_index(folder, "")
        if list(shards) == names and np.array_equal(samples, rows) and not (folder / OLD_INDEX_NAME).exists():
            return False
    except (FileNotFoundError, ValueError):
        pass  # absent or damaged
    save_index(folder, names, rows)
    return True


def timm_info(name: str, split: str, names: list[str], lengths: list[int]) -> bytes:
    """The content of INFO_NAME, by which timm finds the shards of a split."""
    entry = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    return dump({"name": name, "splits": {split: entry}})


def _manifest(
    conversion: Conversion, split: str, seed: int, names: list[str], records: list[ShardRecord]
) -> dict[str, Any]:
    source, policy = conversion.source, conversion.policy
    changes: Counter[str] = Counter()
    for record in records:
        changes.update(record.changes)
    shards = [
        {"name": name, "sha256": record.sha256, "bytes": record.num_bytes, "samples": len(record.rows)}
        for name, record in zip(names, records, strict=True)
    ]
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
        "changes": dict(sorted(changes.items())),
        "classes": list(source.classes),
        "class_names": list(source.class_names),
        "attributions": list(source.attributions),
        "shards": shards,
    }


def describe_rows(rows: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Statistics from the index alone: counts, sizes in pixels and bytes, images per class."""
    shorter = np.minimum(rows["height"], rows["width"])
    counts = np.histogram(shorter, SIZE_EDGES)[0].tolist()
    histogram = {f"{low}-{high - 1}": n for low, high, n in zip(SIZE_EDGES, SIZE_EDGES[1:], counts, strict=False) if n}
    labels = np.bincount(rows["label"][rows["label"] >= 0], minlength=len(classes))
    return {
        "num_samples": len(rows),
        "num_unlabelled": int((rows["label"] < 0).sum()),
        "shorter_side": histogram,
        "height": _spread(rows["height"]),
        "width": _spread(rows["width"]),
        "bytes": _spread(rows["size"]),
        "per_class": {classes[label] if classes else str(label): int(n) for label, n in enumerate(labels)},
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def mean_and_std(sums: list[np.ndarray]) -> dict[str, Any]:
    """Per channel over the sampled images, in 0..1, from their `pixel_sums`: exact, whatever the order of shards."""
    count, *totals = np.sum(sums, axis=0).tolist()
    mean = [total / max(count, 1) / 255 for total in totals[:3]]
    variance = [squares / max(count, 1) / 255**2 - m * m for squares, m in zip(totals[3:], mean, strict=True)]
    std = [max(v, 0.0) ** 0.5 for v in variance]
    return {"mean": [round(m, 6) for m in mean], "std": [round(s, 6) for s in std], "mean_std_pixels": count}


def find_duplicates(folder: Path, names: list[str], rows: np.ndarray, fingerprints: np.ndarray) -> dict[str, Any]:
    """Images with the same bytes: found by fingerprint, confirmed by their bytes. Lists the first hundred groups."""
    _, inverse, counts = np.unique(fingerprints, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[inverse] > 1)
    groups: dict[bytes, list[int]] = {}
    for row in suspects.tolist():
        groups.setdefault(hashlib.sha256(stored_bytes(folder, names, rows[row])).digest(), []).append(row)
    same = [group for group in groups.values() if len(group) > 1]
    listed = [[[int(rows["shard"][row]), int(rows["offset"][row])] for row in group] for group in same[:100]]
    return {"groups": len(same), "extra_images": sum(len(group) - 1 for group in same), "first_groups": listed}


def stored_bytes(folder: Path, names: list[str], row: np.void) -> bytes:
    with (folder / names[row["shard"]]).open("rb") as file:
        file.seek(int(row["offset"]))
        return file.read(int(row["size"]))
