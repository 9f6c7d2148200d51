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
    from tools.shards.decode_check import decode_errors

    try:
        index = opened(case.dataset, case.data) if case.data else None
    except (ValueError, OSError):
        index = None
    if index is None:
        return skip(f'no shards to check, see "{INDEX_CHECK}"')
    rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
    images = [(index.encoded(row), int(index.samples[row]["height"]), int(index.samples[row]["width"])) for row in rows]
    bad = [(row, error) for row, error in zip(rows, decode_errors(images), strict=True) if error]
    if bad:
        return fail(f"{len(bad)} of {len(rows)}: {index.describe(bad[0][0])}: {bad[0][1]}", COPY_AGAIN)
    return ok(f"{len(rows)} decoded to their indexed sizes")


DATA_CHECKS = {INDEX_CHECK: Check(check_index, VERIFY), "shards: sampled images": Check(check_images)}
