"""Turns a source into shards, in parallel, and after any interruption; with their index, manifest and lists next to them."""

import errno
import json
import multiprocessing
import shutil
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console

from pipeline.files import write_atomic
from pipeline.lock import exclusive
from pipeline.quarantine import allowed_bad
from pipeline.shards.index_file import index_files
from pipeline.shards.manifest import MANIFEST_NAME, read_object
from pipeline.text import plural
from tools.own_process import forked_workers
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER, Conversion, ShardRecord, SharedCounts, complete_shard
from train.output.display import ProgressDisplay

REJECTED_NAME, COPIES_NAME = "rejected.jsonl", "copies.jsonl"
IN_WORDS = {"source": "the images, or --val-ratio,", "prefix": "the name of the source"}


def convert(conversion: Conversion) -> str:
    """Write the missing shards of a split, then the files next to them; returns a line on that. Raises ValueError and OSError."""
    folder, start = conversion.folder, time.monotonic()
    (folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
    with exclusive(folder, "choose another --out", f"{RECORD_FOLDER}/.lock"):
        _claim_folder(conversion)
        written = _run_workers(conversion)
        changed, rejects = finish_split(conversion)
    if not changed and not written:
        return f"{folder}: already complete, nothing to do"
    done = f"{plural(written, 'shard')} written in {time.monotonic() - start:.1f} s"
    bad = f", {plural(rejects, 'bad image')} left out ({folder / REJECTED_NAME})" if rejects else ""
    return f"{folder}: {plural(len(conversion.source.catalogue) - rejects, 'image')}, {done}{bad}"


def _claim_folder(conversion: Conversion) -> None:
    """Record which conversion a folder belongs to. Raises ValueError when it belongs to another one."""
    folder, source = conversion.folder, conversion.source
    # Everything that the bytes of the shards depend on.
    identity = {
        "source": source.catalogue.digest(),
        "classes": list(source.classes),
        "layout": source.layout,
        "prefix": conversion.prefix,
        "seed": conversion.seed,
        "num_shards": len(conversion.shards),
        **asdict(conversion.policy),
    }
    path = folder / RECORD_FOLDER / IDENTITY_NAME
    for other in folder.parent.glob(f"*/{RECORD_FOLDER}/{IDENTITY_NAME}"):
        varied = len(set(source.catalogue.size)) > 1  # else the digest hardly tells images apart
        if other != path and varied and read_object(other, f"Remove {other}").get("source") == identity["source"]:
            raise ValueError(
                f"{folder}: would hold the same images as {other.parents[1]}, and accuracies on them would mean nothing. "
                "Convert into another --out with --val-ratio 0.1, which sets a tenth of them aside"
            )
    if not path.exists():
        if foreign := sorted(item.name for item in folder.glob("*.tar")):
            raise ValueError(f"{folder}: holds other shards ({foreign[0]}, ...): choose another --out")
        write_atomic(path, json.dumps(identity, indent=1))
    before = read_object(path, f"Remove {folder} and convert again")
    if different := sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key)):
        changed = ", ".join(IN_WORDS.get(key, key) for key in different)
        raise ValueError(
            f"{folder}: holds shards of another conversion ({changed} differ): use the same options, choose another "
            "--out, or remove that folder"
        )


def _run_workers(conversion: Conversion) -> int:
    """Complete each shard; returns how many had to be written."""
    counts, start, written = SharedCounts(multiprocessing.get_context("fork")), time.monotonic(), 0
    total, display = len(conversion.source.catalogue), Console(stderr=True)
    workers = forked_workers(min(conversion.workers, len(conversion.shards)), partial(complete_shard, conversion, counts))
    try:
        with workers as submit, ProgressDisplay(display, conversion.prefix, "image", total, transient=True) as progress:
            pending = {submit(shard) for shard in conversion.shards}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    written += sum(future.result() for future in finished)
                    images, num_bytes, rejects = counts.totals[:]
                    passed = max(time.monotonic() - start, 1e-6)
                    speed = f"{images / passed:,.0f} images/s · {num_bytes / 1e6 / passed:,.0f} MB/s"
                    progress.show(images, f"{speed} · {rejects} rejected")
                    if rejects > allowed_bad(total, conversion.max_bad_fraction):
                        raise ValueError(
                            f"{conversion.folder}: {rejects} of {total} images are bad, allowed "
                            f"{conversion.max_bad_fraction:.2%} (--max-bad-fraction); the first: "
                            f"{counts.first.value.decode(errors='replace')}. Check the source, or allow more and run again: "
                            "finished shards are kept"
                        )
            finally:
                counts.stop.set()
        return written
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = f"{shutil.disk_usage(conversion.folder).free / 1e6:,.0f} MB free"
        raise OSError(f"{conversion.folder}: disk full ({free}): make room and run the same command again") from None


def finish_split(conversion: Conversion) -> tuple[bool, int]:
    """Write the files next to the tars; returns True if one had to be written, and the number of rejected images."""
    folder = conversion.folder
    records = [ShardRecord.load(conversion.record_path(shard)) for shard in conversion.shards]
    rows = np.concatenate([record.rows for record in records])
    if len(rows) == 0:
        raise ValueError(f"{folder}: every image was rejected, see {RECORD_FOLDER}")
    # All shards are complete, so no process is writing any more: these are left from killed runs.
    for unfinished in (*folder.glob(".*.partial"), *(folder / RECORD_FOLDER).glob(".*.partial")):
        unfinished.unlink(missing_ok=True)
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
        "changes": dict(sorted(sum((Counter(record.changes) for record in records), Counter()).items())),
        "classes": list(source.classes),
        "attributions": list(source.attributions),
        "shards": [
            {"name": conversion.shard_path(shard).name, "sha256": r.sha256, "bytes": r.num_bytes, "samples": len(r.rows)}
            for shard, r in enumerate(records)
        ],
    }
