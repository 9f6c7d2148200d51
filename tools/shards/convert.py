"""Turns a source into shards: assigns images to shards, writes them in parallel, continues after any interruption."""

import errno
import json
import multiprocessing
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict
from functools import partial

from rich.console import Console

from pipeline.files import write_atomic
from pipeline.lock import exclusive
from pipeline.quarantine import allowed_bad
from pipeline.shards.manifest import read_object
from pipeline.text import plural
from tools.own_process import forked_workers
from tools.shards.report import REJECTED_NAME, finish_split
from tools.shards.writer import IDENTITY_NAME, RECORD_FOLDER, Conversion, SharedCounts, complete_shard
from train.output.display import ProgressDisplay

MB = 1e6
IN_WORDS = {"source": "the images, or --val-ratio,", "prefix": "the name of the source"}


def convert(conversion: Conversion) -> str:
    """Write the missing shards of a split and, when all exist, the files next to them; returns a line on what was done.

    Raises ValueError when the folder holds another conversion, another process converts into it or too many images are bad,
    OSError when the disk is full.
    """
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
                    speed = f"{images / passed:,.0f} images/s · {num_bytes / MB / passed:,.0f} MB/s"
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
        free = f"{shutil.disk_usage(conversion.folder).free / MB:,.0f} MB free"
        raise OSError(f"{conversion.folder}: disk full ({free}): make room and run the same command again") from None
