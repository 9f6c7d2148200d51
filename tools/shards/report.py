"""What lies beside the tars of a finished split: index, manifest, statistics, rejects, timm's info file."""

import fcntl
import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards.index import INDEX_NAME, save_index
from tools.shards.writer import RECORD_FOLDER, ShardPlan, ShardRecord, write_file

MANIFEST_NAME = "manifest.json"
STATS_NAME = "stats.json"
INFO_NAME = "_info.json"
REJECTED_NAME = "rejected.jsonl"
FORMAT_VERSION = 1
SIZE_EDGES = (0, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 1 << 31)


def finish_split(plan: ShardPlan, split: str, seed: int) -> bool:
    """Write every file beside the tars from the shards' records; True when one of them was not there as it should be."""
    with _only_one(plan.folder):
        records = [ShardRecord.load(plan.record_path(shard)) for shard in range(plan.num_shards)]
        names = [plan.shard_name(shard) for shard in range(plan.num_shards)]
        rows = np.concatenate([record.rows for record in records])
        if len(rows) == 0:
            raise ValueError(f"{plan.folder}: every image was rejected, see {RECORD_FOLDER}")
        _sweep(plan)
        changed = _save_index_if_new(plan.folder, names, rows)
        rejected = [bad for record in records for bad in record.rejected]
        files = {
            INFO_NAME: dump(_timm_info(plan.source.name, split, names, records)),
            MANIFEST_NAME: dump(_manifest(plan, split, seed, names, records)),
            STATS_NAME: dump(
                describe_rows(rows, plan.source.classes) | _content_stats(plan.folder, names, rows, records)
            ),
        }
        if rejected:
            files[REJECTED_NAME] = "".join(json.dumps(bad) + "\n" for bad in rejected).encode()
        elif (plan.folder / REJECTED_NAME).exists():
            (plan.folder / REJECTED_NAME).unlink()
        for name, content in files.items():
            path = plan.folder / name
            if not path.exists() or path.read_bytes() != content:
                write_file(path, content)
                changed = True
        return changed


def dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Tasks of a job array may all find the last shard done at once: one of them writes at a time."""
    with (folder / RECORD_FOLDER / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(plan: ShardPlan) -> None:
    for partial in (*plan.folder.glob(".*.partial"), *(plan.folder / RECORD_FOLDER).glob(".*.partial")):
        partial.unlink(missing_ok=True)


def _save_index_if_new(folder: Path, names: list[str], rows: np.ndarray) -> bool:
    """The index is compared by content, so that a damaged one is written again."""
    try:
        with np.load(folder / INDEX_NAME, allow_pickle=False) as file:
            if file["shards"].tolist() == names and np.array_equal(file["samples"], rows):
                return False
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged
    save_index(folder, names, rows)
    return True


def _timm_info(name: str, split: str, names: list[str], records: list[ShardRecord]) -> dict[str, Any]:
    lengths = [len(record.rows) for record in records]
    entry = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    return {"name": name, "splits": {split: entry}}


def _manifest(plan: ShardPlan, split: str, seed: int, names: list[str], records: list[ShardRecord]) -> dict[str, Any]:
    source, policy = plan.source, plan.policy
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
    """Statistics that the index alone holds: counts, sizes in pixels and bytes, images per class."""
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


def _content_stats(folder: Path, names: list[str], rows: np.ndarray, records: list[ShardRecord]) -> dict[str, Any]:
    prints = np.concatenate([record.fingerprints for record in records])
    return {"duplicates": find_duplicates(folder, names, rows, prints)} | mean_and_std(
        [record.pixels for record in records]
    )


def mean_and_std(sums: list[list[list[int]]]) -> dict[str, Any]:
    """Per channel over the sampled images, in 0..1. Sums are exact integers, so the order of shards does not matter."""
    count = sum(entry[0][0] for entry in sums)
    first = [sum(entry[1][channel] for entry in sums) for channel in range(3)]
    second = [sum(entry[2][channel] for entry in sums) for channel in range(3)]
    mean = [total / max(count, 1) / 255 for total in first]
    variance = [squares / max(count, 1) / 255**2 - m * m for squares, m in zip(second, mean, strict=True)]
    std = [max(v, 0.0) ** 0.5 for v in variance]
    return {"mean": [round(m, 6) for m in mean], "std": [round(s, 6) for s in std], "mean_std_pixels": count}


def find_duplicates(folder: Path, names: list[str], rows: np.ndarray, prints: np.ndarray) -> dict[str, Any]:
    """Images with the same bytes: fingerprints find them, the bytes confirm it. Lists the first hundred groups."""
    _, inverse, counts = np.unique(prints, return_inverse=True, return_counts=True)
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
