"""Turn a source into shards: plan, write in parallel, continue after any interruption."""

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

from pipeline.shards.index import UNLABELLED
from tools.shards.catalogue import Source
from tools.shards.file_kinds import describe_left_out
from tools.shards.images import ImagePolicy
from tools.shards.progress import ShardProgress
from tools.shards.report import finish_split
from tools.shards.writer import (
    RECORD_FOLDER,
    ShardPlan,
    ShardRecord,
    Tally,
    check_one,
    shard_is_whole,
    write_file,
    write_shard,
)

SHARD_BYTES = 256 << 20
SHARD_SAMPLES = 10_000
PLAN_NAME = "plan.json"
FEW_BAD = 5
FIRST_LOOKED_AT = 1_000
IN_WORDS = {"source": "the images, or --val-ratio,", "prefix": "the name of the source"}


@dataclass(frozen=True)
class Outcome:
    """What a call of `convert` did. `complete`: every shard of the split is there, those of other tasks too.

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


def make_plan(source: Source, folder: Path, split: str, options: ConvertOptions) -> ShardPlan:
    """A global shuffle cut into equal shards (sizes differ by one at most). It depends on nothing but its arguments."""
    total = len(source.catalogue)
    wanted = options.num_shards or max(
        math.ceil(source.catalogue.num_bytes(options.policy.max_bytes) / SHARD_BYTES), math.ceil(total / SHARD_SAMPLES)
    )
    num_shards = min(wanted, total)
    # Raw Philox output, unlike `permutation`, is promised to stay the same in every numpy release.
    order = np.argsort(np.random.Philox(key=options.seed).random_raw(total), kind="stable")
    starts = np.arange(num_shards + 1) * total // num_shards
    return ShardPlan(source, folder, f"{source.name}-{split}", order, starts, options.policy)


def convert(source: Source, folder: Path, split: str, options: ConvertOptions) -> Outcome:
    """Write what is missing of the split.

    Raises ValueError when the folder holds another conversion or too many images are bad, OSError when the disk is full.
    """
    plan = make_plan(source, folder, split, options)
    (folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
    _claim_folder(plan, options)
    mine = range(options.task_index, plan.num_shards, options.num_tasks)
    for name in (plan.shard_name(shard) for shard in mine):
        for partial in folder.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)
    written = _run_workers(plan, mine, options)
    rejects = sum(len(ShardRecord.load(plan.record_path(shard)).rejected) for shard in mine)
    _check_rejects(plan, rejects, options)
    if not all(plan.record_path(shard).exists() for shard in range(plan.num_shards)):
        return Outcome(len(written), complete=False, changed=True, left_out=rejects)
    changed = finish_split(plan, split, options.seed)
    left_out = sum(len(ShardRecord.load(plan.record_path(shard)).rejected) for shard in range(plan.num_shards))
    return Outcome(len(written), complete=True, changed=changed or bool(written), left_out=left_out)


def _claim_folder(plan: ShardPlan, options: ConvertOptions) -> None:
    """Refuse to mix two conversions in one folder; a second run of the same one continues it."""
    identity = {
        "source": plan.source.catalogue.digest(),
        "classes": list(plan.source.classes),
        "layout": plan.source.layout,
        "prefix": plan.prefix,
        "seed": options.seed,
        "num_shards": plan.num_shards,
        **asdict(plan.policy),
    }
    path = plan.folder / RECORD_FOLDER / PLAN_NAME
    if not path.exists():
        foreign = sorted(item.name for item in plan.folder.glob("*.tar"))
        if foreign:
            raise ValueError(f"{plan.folder}: holds other shards ({foreign[0]}, ...): choose another --out")
        write_file(path, json.dumps(identity, indent=1).encode())
    before = json.loads(path.read_text())
    if before != identity:
        different = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
        changed = [IN_WORDS.get(key, key) for key in different]
        raise ValueError(
            f"{plan.folder}: holds shards of another conversion ({', '.join(changed)} differ): "
            "use the same options, choose another --out, or remove that folder"
        )


def _run_workers(plan: ShardPlan, shards: range, options: ConvertOptions) -> list[int]:
    """Make each shard whole; returns those that had to be written."""
    num_images = sum(int(plan.starts[shard + 1] - plan.starts[shard]) for shard in shards)
    context = multiprocessing.get_context("fork")  # the workers inherit the catalogue instead of reading it again
    tally = Tally(context)
    pool = ProcessPoolExecutor(max(1, min(options.workers, len(shards))), context, _start_worker, (plan, tally))
    try:
        pending: set[Future[int | None]] = {pool.submit(_make_whole, shard) for shard in shards}
        written: list[int] = []
        with ShardProgress(plan.prefix, num_images) as progress:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                written += [shard for future in finished if (shard := future.result()) is not None]
                progress.update(*tally.totals())
                _check_rejects(plan, tally.totals()[2], options)
        return sorted(written)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(plan.folder).free / 1e6
        raise OSError(
            f"{plan.folder}: disk full ({free:,.0f} MB free): make room and run the same command again"
        ) from None
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed (out of memory?): run the same command again with fewer --workers"
        ) from None
    finally:
        tally.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent() -> None:
    """Linux: have this process killed when its parent dies, so that no orphan goes on writing (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


_WORK: list[tuple[ShardPlan, Tally]] = []  # set once in each worker process


def _start_worker(plan: ShardPlan, tally: Tally) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with_parent()
    _WORK.append((plan, tally))


def _make_whole(shard: int) -> int | None:
    plan, tally = _WORK[0]
    if shard_is_whole(plan, shard):
        rejects = len(ShardRecord.load(plan.record_path(shard)).rejected)
        tally.add(int(plan.starts[shard + 1] - plan.starts[shard]), 0, rejects)
        return None
    write_shard(plan, shard, tally)
    return shard


def _check_rejects(plan: ShardPlan, rejects: int, options: ConvertOptions) -> None:
    total = len(plan.source.catalogue)
    # Of a small folder a few may be bad, and up to a tenth: one of fifty is above a hundredth, and no reason to stop.
    few = min(FEW_BAD, total / 10) if options.max_bad_fraction > 0 else 0
    if rejects <= max(options.max_bad_fraction * total, few):
        return
    records = [ShardRecord.load(path) for path in sorted((plan.folder / RECORD_FOLDER).glob("*.npz"))]
    examples = [f"{bad['name']}: {bad['reason']}" for record in records for bad in record.rejected] or _first_bad(plan)
    raise ValueError(
        f"{plan.folder}: {rejects} of {total} images are bad, allowed {options.max_bad_fraction:.2%} (--max-bad-fraction)"
        + (f"; the first: {examples[0]}" if examples else "")
        + ". Look at the source, or allow more and run again: finished shards are kept"
    )


def _first_bad(plan: ShardPlan) -> list[str]:
    """An example where no shard is finished yet, so that none is on record: images lie shuffled, so one comes soon."""
    for row in plan.order[:FIRST_LOOKED_AT].tolist():
        if isinstance(reason := check_one(plan, row), str):
            return [f"{plan.source.catalogue.name(row)}: {reason}"]
    return []


def describe_source(source: Source) -> list[str]:
    """What was found and how it is read, and what is passed over, in lines."""
    left_out = describe_left_out(source.passed_over)
    return [f"layout   {source.layout} ({'; '.join(source.notes)})", *([left_out] if left_out else [])]


def describe_plan(plan: ShardPlan, options: ConvertOptions) -> list[str]:
    """What a conversion would do, in lines; reads and checks a few images to guess the time."""
    catalogue = plan.source.catalogue
    probe = [] if plan.source.layout == "parquet" else plan.order[:64].tolist()  # parquet has no cheap random reads
    start = time.perf_counter()
    for row in probe:
        check_one(plan, row)
    seconds = (time.perf_counter() - start) / max(len(probe), 1) * len(catalogue) / options.workers
    existing = next(path for path in (plan.folder, *plan.folder.parents) if path.exists())
    # headers, padding, `cls` and `json` take about 3 KB an image
    num_bytes = catalogue.num_bytes(plan.policy.max_bytes)
    need = num_bytes + 3_000 * len(catalogue)
    num_classes = len(plan.source.classes) or len(set(catalogue.label) - {UNLABELLED})
    classes = f"in {num_classes:,} classes" if num_classes else "without labels"
    return [
        f"images   {len(catalogue):,} {classes}, {num_bytes / 1e6:,.1f} MB",
        f"shards   {plan.num_shards:,} of about {len(catalogue) // plan.num_shards:,} images: "
        f"{plan.folder / plan.shard_name(0)} ...",
        f"time     about {seconds:,.1f} s with {options.workers} workers (from {len(probe)} images, writing not included)",
        f"disk     about {need / 1e6:,.1f} MB needed, {shutil.disk_usage(existing).free / 1e6:,.1f} MB free",
    ]
