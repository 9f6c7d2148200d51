"""Turns a source into shards: assigns images to shards, writes them in parallel, continues after any interruption."""

import errno
import json
import math
import multiprocessing
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.files import write_atomic
from pipeline.lock import exclusive
from pipeline.quarantine import allowed_bad
from pipeline.shards.manifest import read_object
from pipeline.text import plural
from tools.own_process import forked_workers
from tools.shards.catalogue import Source
from tools.shards.images import ImagePolicy
from tools.shards.report import REJECTED_NAME, finish_split
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER, Conversion, SharedCounts, intact_record, write_shard
from train.output.display import ProgressDisplay

# A shard is large enough for sequential reads from a store, and small enough to be cached and written again.
SHARD_BYTES, SHARD_SAMPLES = 256 << 20, 10_000
MB = 1e6
IN_WORDS = {"source": "the images, or --val-ratio,", "prefix": "the name of the source"}


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. `num_shards` 0: about 256 MiB or 10,000 images each."""

    seed: int = 0
    num_shards: int = 0
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    max_bad_fraction: float = 0.01
    workers: int = 1


def assign_images(source: Source, folder: Path, split: str, options: ConvertOptions) -> Conversion:
    """Shuffle all images and cut them into shards whose sizes differ by at most one; depends only on the arguments."""
    total, num_bytes = len(source.catalogue), sum(size for size in source.catalogue.size if size <= options.policy.max_bytes)
    num_shards = options.num_shards or max(math.ceil(num_bytes / SHARD_BYTES), math.ceil(total / SHARD_SAMPLES))
    num_shards = min(num_shards, total)
    # Raw Philox output, unlike `permutation`, is guaranteed to stay the same in every numpy release.
    order = np.argsort(np.random.Philox(key=options.seed).random_raw(total), kind="stable")
    starts = np.arange(num_shards + 1) * total // num_shards
    return Conversion(source, folder, f"{source.name}-{split}", order, starts, options.policy)


def convert(source: Source, folder: Path, split: str, options: ConvertOptions) -> str:
    """Write the missing shards of a split and, when all exist, the files next to them; returns a line on what was done.

    Raises ValueError when the folder holds another conversion, another process converts into it or too many images are bad,
    OSError when the disk is full.
    """
    conversion, start = assign_images(source, folder, split, options), time.monotonic()
    (folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
    with exclusive(folder, "choose another --out", f"{RECORD_FOLDER}/.lock"):
        _claim_folder(conversion, options)
        written = _run_workers(conversion, options)
        changed, rejects = finish_split(conversion, split, options.seed)
    if not changed and not written:
        return f"{folder}: already complete, nothing to do"
    done = f"{plural(written, 'shard')} written in {time.monotonic() - start:.1f} s"
    bad = f", {plural(rejects, 'bad image')} left out ({folder / REJECTED_NAME})" if rejects else ""
    return f"{folder}: {plural(len(source.catalogue) - rejects, 'image')}, {done}{bad}"


def _claim_folder(conversion: Conversion, options: ConvertOptions) -> None:
    """Record which conversion a folder belongs to. Raises ValueError when it belongs to another one."""
    # Everything that the bytes of the shards depend on.
    identity = {
        "source": conversion.source.catalogue.digest(),
        "classes": list(conversion.source.classes),
        "layout": conversion.source.layout,
        "prefix": conversion.prefix,
        "seed": options.seed,
        "num_shards": conversion.num_shards,
        **asdict(conversion.policy),
    }
    folder = conversion.folder
    path = folder / RECORD_FOLDER / IDENTITY_NAME
    for other in folder.parent.glob(f"*/{RECORD_FOLDER}/{IDENTITY_NAME}"):
        varied = len(set(conversion.source.catalogue.size)) > 1  # else the digest hardly tells images apart
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


def _run_workers(conversion: Conversion, options: ConvertOptions) -> int:
    """Complete each shard; returns how many had to be written."""
    counts, start, written = SharedCounts(multiprocessing.get_context("fork")), time.monotonic(), 0
    total, display = len(conversion.source.catalogue), Console(stderr=True)
    workers = forked_workers(min(options.workers, conversion.num_shards), partial(_complete_shard, conversion, counts))
    try:
        with workers as submit, ProgressDisplay(display, conversion.prefix, "image", total, transient=True) as progress:
            pending = {submit(shard) for shard in range(conversion.num_shards)}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    written += sum(future.result() for future in finished)
                    images, num_bytes, rejects = counts.totals[:]
                    passed = max(time.monotonic() - start, 1e-6)
                    speed = f"{images / passed:,.0f} images/s · {num_bytes / MB / passed:,.0f} MB/s"
                    progress.show(images, f"{speed} · {rejects} rejected")
                    if rejects > allowed_bad(total, options.max_bad_fraction):
                        raise ValueError(
                            f"{conversion.folder}: {rejects} of {total} images are bad, allowed {options.max_bad_fraction:.2%} "
                            f"(--max-bad-fraction); the first: {counts.first.value.decode(errors='replace')}. Check the source, "
                            "or allow more and run again: finished shards are kept"
                        )
            finally:
                counts.stop.set()
        return written
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = f"{shutil.disk_usage(conversion.folder).free / MB:,.0f} MB free"
        raise OSError(f"{conversion.folder}: disk full ({free}): make room and run the same command again") from None


def _complete_shard(conversion: Conversion, counts: SharedCounts, shard: int) -> bool:
    """Write the shard unless it is complete; returns True if it had to be written."""
    if record := intact_record(conversion, shard):
        counts.add(conversion.shard_size(shard), 0, record.rejected)
        return False
    write_shard(conversion, shard, counts)
    return True
