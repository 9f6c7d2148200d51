"""Turn a source into shards: assign images to shards, write in parallel, continue after any interruption."""

import ctypes
import errno
import json
import math
import multiprocessing
import shutil
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.quarantine import allowed_bad
from pipeline.shards.index import UNLABELLED
from pipeline.shards.manifest import read_object
from tools.shards.catalogue import Source
from tools.shards.file_kinds import describe_left_out
from tools.shards.images import ImagePolicy
from tools.shards.report import finish_split
from tools.shards.writer import (
    IDENTITY_NAME,
    RECORD_FOLDER,
    Conversion,
    ShardRecord,
    SharedCounts,
    check_one,
    shard_is_complete,
    write_file,
    write_shard,
)
from train.output.display import ProgressDisplay

SHARD_BYTES = 256 << 20
SHARD_SAMPLES = 10_000
MAX_TRIED = 1_000
MB = 1e6
TAR_OVERHEAD = 3_000  # bytes per image: headers, padding, `cls` and `json`
IN_WORDS = {"source": "the images, or --val-ratio,", "prefix": "the name of the source"}


@dataclass(frozen=True)
class ConvertResult:
    """What a call of `convert` did. `complete`: every shard of the split is there, including those of other tasks.

    `left_out`: bad images, of the whole split when it is complete.
    """

    written: int
    complete: bool
    changed: bool
    left_out: int


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. `num_shards` 0: about 256 MiB or 10,000 images each. Task i of n writes every n-th shard."""

    seed: int = 0
    num_shards: int = 0
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    max_bad_fraction: float = 0.01
    workers: int = 1
    task_index: int = 0
    num_tasks: int = 1


def assign_images(source: Source, folder: Path, split: str, options: ConvertOptions) -> Conversion:
    """A global shuffle cut into equal shards (sizes differ by one at most); depends on nothing but its arguments."""
    total = len(source.catalogue)
    num_bytes = source.catalogue.num_bytes(options.policy.max_bytes)
    num_shards = options.num_shards or max(math.ceil(num_bytes / SHARD_BYTES), math.ceil(total / SHARD_SAMPLES))
    num_shards = min(num_shards, total)
    # Raw Philox output, unlike `permutation`, is guaranteed to stay the same in every numpy release.
    order = np.argsort(np.random.Philox(key=options.seed).random_raw(total), kind="stable")
    starts = np.arange(num_shards + 1) * total // num_shards
    return Conversion(source, folder, f"{source.name}-{split}", order, starts, options.policy)


def convert(source: Source, folder: Path, split: str, options: ConvertOptions) -> ConvertResult:
    """Write what is missing of the split.

    Raises ValueError when the folder holds another conversion or too many images are bad, OSError when the disk is full.
    """
    conversion = assign_images(source, folder, split, options)
    (folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
    _claim_folder(conversion, options)
    mine = range(options.task_index, conversion.num_shards, options.num_tasks)
    for shard in mine:
        for partial in folder.glob(f".{conversion.shard_name(shard)}.*.partial"):
            partial.unlink(missing_ok=True)
    written = _run_workers(conversion, mine, options)
    rejects = sum(len(ShardRecord.load(conversion.record_path(shard)).rejected) for shard in mine)
    _check_rejects(conversion, rejects, options)
    if not all(conversion.record_path(shard).exists() for shard in range(conversion.num_shards)):
        return ConvertResult(written, complete=False, changed=True, left_out=rejects)
    changed, left_out = finish_split(conversion, split, options.seed)
    return ConvertResult(written, complete=True, changed=changed or written > 0, left_out=left_out)


def _claim_folder(conversion: Conversion, options: ConvertOptions) -> None:
    """Refuse to mix two conversions in one folder; a second run of the same one continues it."""
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
    if not path.exists():
        if foreign := sorted(item.name for item in folder.glob("*.tar")):
            raise ValueError(f"{folder}: holds other shards ({foreign[0]}, ...): choose another --out")
        write_file(path, json.dumps(identity, indent=1).encode())
    before = read_object(path, f"Remove {folder} and convert again")
    if before != identity:
        different = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
        changed = ", ".join(IN_WORDS.get(key, key) for key in different)
        raise ValueError(
            f"{folder}: holds shards of another conversion ({changed} differ): use the same options, choose another "
            "--out, or remove that folder"
        )


class ShardProgress(ProgressDisplay):
    """Images, bytes and rejects of a run over `num_images`, on stderr. Call `update` with totals so far."""

    def __init__(self, what: str, num_images: int) -> None:
        super().__init__(Console(stderr=True), what, "image", num_images, transient=True)

    def update(self, images: int, num_bytes: int, rejects: int) -> None:
        passed = max(time.monotonic() - self._started, 1e-6)
        speed = f"{images / passed:,.0f} images/s · {num_bytes / MB / passed:,.0f} MB/s"
        self.show(images, f"{speed} · {rejects} rejected")


def _run_workers(conversion: Conversion, shards: range, options: ConvertOptions) -> int:
    """Complete each shard; returns how many had to be written."""
    num_images = sum(int(conversion.starts[shard + 1] - conversion.starts[shard]) for shard in shards)
    context = multiprocessing.get_context("fork")  # the workers inherit the catalogue instead of reading it again
    counts, workers = SharedCounts(context), max(1, min(options.workers, len(shards)))
    pool = ProcessPoolExecutor(workers, context, _start_worker, (conversion, counts))
    try:
        pending: set[Future[bool]] = {pool.submit(_complete_shard, shard) for shard in shards}
        written = 0
        with ShardProgress(conversion.prefix, num_images) as progress:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                written += sum(future.result() for future in finished)
                progress.update(*counts.totals())
                _check_rejects(conversion, counts.totals()[2], options)
        return written
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = f"{shutil.disk_usage(conversion.folder).free / 1e6:,.0f} MB free"
        raise OSError(f"{conversion.folder}: disk full ({free}): make room and run the same command again") from None
    except BrokenProcessPool:
        raise ValueError("a worker was killed (out of memory?): run the same command with fewer --workers") from None
    finally:
        counts.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent() -> None:
    """Linux: have this process killed when its parent dies, so that no orphan goes on writing (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


_WORK: list[tuple[Conversion, SharedCounts]] = []  # set once in each worker process


def _start_worker(conversion: Conversion, counts: SharedCounts) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent()
    _WORK.append((conversion, counts))


def _complete_shard(shard: int) -> bool:
    """Whether the shard had to be written."""
    conversion, counts = _WORK[0]
    if shard_is_complete(conversion, shard):
        rejects = len(ShardRecord.load(conversion.record_path(shard)).rejected)
        counts.add(int(conversion.starts[shard + 1] - conversion.starts[shard]), 0, rejects)
        return False
    write_shard(conversion, shard, counts)
    return True


def _check_rejects(conversion: Conversion, rejects: int, options: ConvertOptions) -> None:
    total = len(conversion.source.catalogue)
    if rejects <= allowed_bad(total, options.max_bad_fraction):
        return
    example = _first_reject(conversion)
    raise ValueError(
        f"{conversion.folder}: {rejects} of {total} images are bad, allowed {options.max_bad_fraction:.2%} "
        f"(--max-bad-fraction){example}. Check the source, or allow more and run again: finished shards are kept"
    )


def _first_reject(conversion: Conversion) -> str:
    """From the records or, where no shard is finished yet, from the images in stored order."""
    for path in sorted((conversion.folder / RECORD_FOLDER).glob("*.npz")):
        for bad in ShardRecord.load(path).rejected:
            return f"; the first: {bad['name']}: {bad['reason']}"
    for row in conversion.order[:MAX_TRIED].tolist():
        if isinstance(reason := check_one(conversion, row), str):
            return f"; the first: {conversion.source.catalogue.name(row)}: {reason}"
    return ""


def describe_source(source: Source) -> list[str]:
    """What was found, how it is read and what is skipped, in lines."""
    left_out = describe_left_out(source.skipped)
    return [f"layout   {source.layout} ({'; '.join(source.notes)})", *([left_out] if left_out else [])]


def describe_conversion(conversion: Conversion, options: ConvertOptions) -> list[str]:
    """What a conversion would do, in lines; reads and checks a few images to estimate the time."""
    source, catalogue = conversion.source, conversion.source.catalogue
    probe = [] if source.layout == "parquet" else conversion.order[:64].tolist()  # parquet has no cheap random reads
    start = time.perf_counter()
    for row in probe:
        check_one(conversion, row)
    seconds = (time.perf_counter() - start) / max(len(probe), 1) * len(catalogue) / options.workers
    existing = next(path for path in (conversion.folder, *conversion.folder.parents) if path.exists())
    num_bytes = catalogue.num_bytes(conversion.policy.max_bytes)
    needed, free = num_bytes + TAR_OVERHEAD * len(catalogue), shutil.disk_usage(existing).free
    num_classes = len(source.classes) or len(set(catalogue.label) - {UNLABELLED})
    classes = f"in {num_classes:,} classes" if num_classes else "without labels"
    per_shard, first = len(catalogue) // conversion.num_shards, conversion.folder / conversion.shard_name(0)
    return [
        f"images   {len(catalogue):,} {classes}, {num_bytes / 1e6:,.1f} MB",
        f"shards   {conversion.num_shards:,} of about {per_shard:,} images: {first} ...",
        f"time     about {seconds:,.1f} s with {options.workers} workers (from {len(probe)} images, without writing)",
        f"disk     about {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free",
    ]
