"""The files next to the tars of a finished split: index, manifest, statistics, rejected images."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_atomic
from pipeline.lock import locked
from pipeline.shards.index import INDEX_NAME, open_index, save_index
from pipeline.shards.manifest import MANIFEST_NAME
from tools.shards.writer import RECORD_FOLDER, Conversion, ShardRecord

STATS_NAME, REJECTED_NAME = "stats.json", "rejected.jsonl"
FORMAT_VERSION = 1
SIZE_EDGES = (0, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 1 << 31)
MAX_GROUPS = 100  # groups of duplicates that stats.json lists


def finish_split(conversion: Conversion, split: str, seed: int) -> tuple[bool, int]:
    """Write the files next to the tars from the shards' records.

    Returns True if one of them had to be written, and the number of rejected images.
    """
    folder = conversion.folder
    with locked(folder / RECORD_FOLDER / "lock"):  # several tasks of a job array can find the last shard done at once
        records = [ShardRecord.load(conversion.record_path(shard)) for shard in range(conversion.num_shards)]
        names = [conversion.shard_name(shard) for shard in range(conversion.num_shards)]
        rows = np.concatenate([record.rows for record in records])
        if len(rows) == 0:
            raise ValueError(f"{folder}: every image was rejected, see {RECORD_FOLDER}")
        # All shards are complete, so no process is writing any more: these are left from killed runs.
        for partial in (*folder.glob(".*.partial"), *(folder / RECORD_FOLDER).glob(".*.partial")):
            partial.unlink(missing_ok=True)
        changed = not _index_holds(folder, names, rows)
        if changed:
            save_index(folder, names, rows)
        rejected = [bad for record in records for bad in record.rejected]
        fingerprints = np.concatenate([record.fingerprints for record in records])
        sums = [np.concatenate(record.pixels) for record in records]
        files = {
            MANIFEST_NAME: dump(_manifest(conversion, split, seed, names, records)),
            STATS_NAME: dump(describe_images(folder, names, rows, conversion.source.classes, fingerprints, sums)),
        }
        if rejected:
            files[REJECTED_NAME] = "".join(json.dumps(bad) + "\n" for bad in rejected).encode()
        else:
            (folder / REJECTED_NAME).unlink(missing_ok=True)
        # A finished split keeps its files untouched, so that a second run can say that there was nothing to do.
        for name, content in files.items():
            path = folder / name
            if not path.exists() or path.read_bytes() != content:
                write_atomic(path, content)
                changed = True
        return changed, len(rejected)


def _index_holds(folder: Path, names: list[str], rows: np.ndarray) -> bool:
    """Return True if the index has this content; an index that is missing or damaged has not."""
    if not (folder / INDEX_NAME).exists():
        return False  # `open_index` scans all tars then
    try:
        index = open_index(folder)
    except ValueError:
        return False
    return index.shards == tuple(names) and np.array_equal(index.samples, rows)


def dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _manifest(conversion: Conversion, split: str, seed: int, names: list[str], records: list[ShardRecord]) -> dict[str, Any]:
    source, policy = conversion.source, conversion.policy
    changes = sum((Counter(record.changes) for record in records), Counter())
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
        "shards": [
            {"name": name, "sha256": record.sha256, "bytes": record.num_bytes, "samples": len(record.rows)}
            for name, record in zip(names, records, strict=True)
        ],
    }


def describe_images(
    folder: Path,
    names: Sequence[str],
    rows: np.ndarray,
    classes: tuple[str, ...],
    fingerprints: np.ndarray,
    sums: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Return the content of STATS_NAME: counts, sizes in pixels and bytes, images per class, duplicates, mean and std."""
    shorter = np.minimum(rows["height"], rows["width"])
    counts = np.histogram(shorter, SIZE_EDGES)[0].tolist()
    histogram = {f"{low}-{high - 1}": n for low, high, n in zip(SIZE_EDGES, SIZE_EDGES[1:], counts, strict=False) if n}
    labels = np.bincount(rows["label"][rows["label"] >= 0], minlength=len(classes))
    spreads = {
        name: {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
        for name, values in (("height", rows["height"]), ("width", rows["width"]), ("bytes", rows["size"]))
    }
    return {
        "num_samples": len(rows),
        "num_unlabelled": int((rows["label"] < 0).sum()),
        "shorter_side": histogram,
        **spreads,
        "per_class": {classes[label] if classes else str(label): int(n) for label, n in enumerate(labels)},
        "duplicates": _find_duplicates(folder, names, rows, fingerprints),
        **_mean_and_std(sums),
    }


def _mean_and_std(sums: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return mean and std per channel, in 0..1, from `pixel_sums`: exact, so the order of the shards does not matter."""
    count, *totals = np.sum(sums, axis=0).tolist()
    mean = [total / max(count, 1) / 255 for total in totals[:3]]
    variance = [squares / max(count, 1) / 255**2 - m * m for squares, m in zip(totals[3:], mean, strict=True)]
    std = [max(v, 0.0) ** 0.5 for v in variance]
    return {"mean": [round(m, 6) for m in mean], "std": [round(s, 6) for s in std], "mean_std_pixels": count}


def _find_duplicates(folder: Path, names: Sequence[str], rows: np.ndarray, fingerprints: np.ndarray) -> dict[str, Any]:
    """Count images with the same bytes: found by fingerprint, confirmed by their bytes."""
    _, inverse, counts = np.unique(fingerprints, return_inverse=True, return_counts=True)
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(counts[inverse] > 1).tolist():
        with (folder / names[rows[row]["shard"]]).open("rb") as file:
            file.seek(int(rows[row]["offset"]))
            content = file.read(int(rows[row]["size"]))
        groups.setdefault(hashlib.sha256(content).digest(), []).append(row)
    same = [group for group in groups.values() if len(group) > 1]
    listed = [[[int(rows["shard"][row]), int(rows["offset"][row])] for row in group] for group in same[:MAX_GROUPS]]
    return {"groups": len(same), "extra_images": sum(len(group) - 1 for group in same), "first_groups": listed}
