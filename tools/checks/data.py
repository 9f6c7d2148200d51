"""Checks of the shards."""

import random
from collections.abc import Callable
from functools import cache

from pipeline.shards.index import ShardIndex, open_index, split_folder
from tools.checks.check import Case, Check, Finding, fail, ok, skip, warn

SAMPLED_IMAGES = 32
INDEX_CHECK = "shards: index"
VERIFY = "python tools/make_shards.py verify FOLDER"
COPY_AGAIN = f"copy the shard again, or convert again; all shards: {VERIFY}"


@cache
def opened(dataset: str, data: str, split: str) -> ShardIndex:
    return open_index(split_folder(dataset, data, split))


def read_index(case: Case, split: str) -> ShardIndex | None:
    """Return the index of a split; None if it cannot be read: `check_index` says why."""
    try:
        return opened(case.dataset, case.data, split) if case.data else None
    except (ValueError, OSError):
        return None


def with_index(check: Callable[[Case, ShardIndex], Finding]) -> Callable[[Case], Finding]:
    """Return a check that is skipped without a readable training split."""

    def find(case: Case) -> Finding:
        index = read_index(case, "train")
        return skip(f'no shards to check, see "{INDEX_CHECK}"') if index is None else check(case, index)

    return find


def check_index(case: Case) -> Finding:
    if case.data is None:
        return skip("neither a CONFIG nor --data names shards")
    index = opened(case.dataset, case.data, "train")
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards")


def check_images(_: Case, index: ShardIndex) -> Finding:
    """Decode some images with the training's decoder, on the CPU."""
    from tools.shards.decode_check import decode_errors

    rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
    images = [(index.encoded(row), int(index.samples[row]["height"]), int(index.samples[row]["width"])) for row in rows]
    bad = [(row, error) for row, error in zip(rows, decode_errors(images), strict=True) if error]
    if bad:
        return fail(f"{len(bad)} of {len(rows)}: {index.describe(bad[0][0])}: {bad[0][1]}", COPY_AGAIN)
    return ok(f"{len(rows)} decoded to their indexed sizes")


def check_labels(case: Case, index: ShardIndex) -> Finding:
    """Compare the classes of train and val: a label must mean the same in both, and there must be several."""
    from train.evaluation import features

    val = read_index(case, "val")
    val = None if val is None or val.folder == index.folder else val
    problems = features.check_labels(index, val or index)
    if problems.one_label:
        fix = "convert the folder whose folders are the classes; without classes, ignore all accuracies"
        return warn(problems.one_label, fix)
    if val is None:
        return skip("no val split, so nothing will be measured")
    features.check_classes(index, val)
    if problems.unknown:
        return warn(problems.unknown, "leave those images out of val, or add some of their classes to train")
    return ok("each label means the same class in train and val")


DATA_CHECKS = {
    INDEX_CHECK: Check(check_index, VERIFY),
    "shards: sampled images": Check(with_index(check_images)),
    "shards: classes": Check(
        with_index(check_labels), "remove the val shards and convert val again next to train, with the same --out"
    ),
}
