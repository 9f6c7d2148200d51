"""Checks of the shards."""

import random
from functools import cache

from pipeline.shards.copied import is_remote
from pipeline.shards.index import ShardIndex, open_index, split_folder
from tools.checks.check import Case, Check, Finding, fail, ok, skip

SAMPLED_IMAGES = 32
INDEX_CHECK = "shards: index"
VERIFY = "python tools/make_shards.py verify FOLDER"
COPY_AGAIN = f"copy the shard again, or convert again; all shards: {VERIFY}"


@cache
def opened(dataset: str, data: str) -> ShardIndex:
    return open_index(split_folder(dataset, data, "train"))


def check_index(case: Case) -> Finding:
    if case.data is None:
        return skip("neither a CONFIG nor --data names shards")
    if is_remote(case.data):
        return skip(f"{case.data}: shards in a store are copied and checked when training starts")
    index = opened(case.dataset, case.data)
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards")


def check_images(case: Case) -> Finding:
    """Decode some images with the training's decoder, on the CPU."""
    from pipeline.crops.device import find_faults

    try:
        index = opened(case.dataset, case.data) if case.data else None
    except (ValueError, OSError):
        index = None
    if index is None:
        return skip(f'no shards to check, see "{INDEX_CHECK}"')
    rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
    if faults := find_faults(index, rows, "cpu"):
        row, fault = next(iter(faults.items()))
        return fail(f"{len(faults)} of {len(rows)}: {index.describe(row)}: {fault}", COPY_AGAIN)
    return ok(f"{len(rows)} decoded")


DATA_CHECKS = {INDEX_CHECK: Check(check_index, VERIFY), "shards: sampled images": Check(check_images)}
