"""The check of the shards."""

import random

from pipeline.shards.copied import is_remote
from pipeline.shards.index import open_index, split_folder
from tools.checks.check import Case, Finding, fail, failure, ok, skip

SAMPLED_IMAGES = 32


def check_shards(case: Case) -> Finding:
    """Open the training split, and decode some of its images with the training's decoder, on the CPU."""
    from pipeline.crops.device import find_faults

    if case.data is None:
        return skip("neither a CONFIG nor --data names shards")
    if is_remote(case.data):
        return skip(f"{case.data}: shards in a store are copied and checked when training starts")
    verify = f"python tools/make_shards.py verify {case.data}"
    try:
        index = open_index(split_folder(case.config.data.dataset if case.config else "custom", case.data, "train"))
        rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
        faults = find_faults(index, rows, "cpu")
    except (OSError, RuntimeError, ValueError) as error:
        return failure(error, verify)
    if faults:
        row, fault = next(iter(faults.items()))
        text = f"{len(faults)} of {len(rows)}: {index.describe(row)}: {fault}"
        return fail(text, f"copy the shard again, or convert again; all shards: {verify}")
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards; {len(rows)} of them decoded")
