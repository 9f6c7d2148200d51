"""Checks of the shards, and of the pipeline's rate against what the model takes."""

import hashlib
import json
import random
import time
from functools import cache
from pathlib import Path

from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.object_store import is_s3
from tools.checks.check import Case, Finding, check, fail, ok, sees_gpu, skipped, warn

MANIFEST = "manifest.json"
SAMPLED_SHARDS, SAMPLED_IMAGES = 8, 32
MOST_HASHED = 2 * 2**30
RATE_S, NEED_S = 3.0, 1.0
NO_DATA = "no CONFIG and no --data"
COPY_AGAIN = "copy the shard again, or convert again; all shards: python tools/make_shards.py verify FOLDER"


@cache
def opened(dataset: str, data: str) -> ShardIndex:
    return open_index(split_folder(dataset, data, "train"))


def index_of(case: Case) -> ShardIndex | None:
    """The training split's, None where it cannot be read: the check of the index says why."""
    try:
        return opened(_dataset(case), case.data) if case.data else None
    except (ValueError, OSError):
        return None


def _dataset(case: Case) -> str:
    return case.config.data.dataset if case.config is not None else "custom"


@check("shards: index")
def shard_index(case: Case) -> Finding:
    if case.data is None:
        return skipped(NO_DATA)
    try:
        index = opened(_dataset(case), case.data)
    except (ValueError, OSError) as error:
        return fail(str(error), f"python tools/make_shards.py verify {case.data}")
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards")


@check("shards: manifest")
def manifest(case: Case) -> Finding:
    index = index_of(case)
    if index is None or is_s3(index.folder) or not (Path(index.folder) / MANIFEST).exists():
        return skipped("no manifest beside the shards" if index else "no index")
    content = json.loads((Path(index.folder) / MANIFEST).read_text())
    listed, found = {entry["name"] for entry in content["shards"]}, set(index.shards)
    if listed != found:
        one = min(listed ^ found)
        text = f"{len(listed)} shards are listed and {len(found)} indexed; {one} is in only one of them"
        return fail(
            text, "copy the folder again whole, or python tools/make_shards.py index FOLDER if the manifest is old"
        )
    if content["num_samples"] != len(index):
        text = f"{content['num_samples']:,} images are listed and {len(index):,} indexed"
        return fail(text, f"python tools/make_shards.py index {index.folder}")
    return ok(f"{len(listed)} shards, {content['num_samples']:,} images, as indexed")


@check("shards: a sampled checksum")
def checksum(case: Case) -> Finding:
    """The smallest of a few shards drawn anew each time, so that several runs look at several."""
    index = index_of(case)
    if index is None or is_s3(index.folder) or not (Path(index.folder) / MANIFEST).exists():
        return skipped("no manifest beside the shards" if index else "no index")
    entries = json.loads((Path(index.folder) / MANIFEST).read_text())["shards"]
    paths = {Path(index.folder) / entry["name"]: entry["sha256"] for entry in entries}
    drawn = random.sample(sorted(path for path in paths if path.exists()), min(SAMPLED_SHARDS, len(paths)))
    path = min(drawn, key=lambda path: path.stat().st_size)
    if path.stat().st_size > MOST_HASHED:
        return skipped(f"{path.name} is too large to read here; python tools/make_shards.py verify {index.folder}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != paths[path]:
            return fail(f"{path}: sha256 differs from {MANIFEST}", COPY_AGAIN)
    return ok(f"{path.name}")


@check("shards: sampled images")
def sampled_images(case: Case) -> Finding:
    """With the decoder of the training, on a CPU."""
    index = index_of(case)
    if index is None:
        return skipped("no index")
    from tools.shards.decode_check import decode_errors

    rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
    images = [(index.encoded(row), int(index.samples[row]["height"]), int(index.samples[row]["width"])) for row in rows]
    bad = [(row, error) for row, error in zip(rows, decode_errors(images), strict=True) if error]
    if bad:
        return fail(f"{len(bad)} of {len(rows)}: {index.describe(bad[0][0])}: {bad[0][1]}", COPY_AGAIN)
    return ok(f"{len(rows)} decoded to their indexed sizes")


@check("pipeline rate")
def rate(case: Case) -> Finding:
    """Images/s of the pipeline alone, against a forward and backward pass of the model alone."""
    index = index_of(case)
    if index is None or case.config is None:
        return skipped("no CONFIG, or no shards that can be read")
    from pipeline.tuning import measure
    from train.build import build_dataset, build_loader

    config = case.config
    batch_size = min(config.data.batch_size, 32, len(index))
    loader = build_loader(config, build_dataset(config), batch_size, normalized=False)
    made = measure(loader, RATE_S)
    if not sees_gpu() and config.device != "cpu":
        return ok(f"{made:,.0f} images/s; the model's need is measured on a GPU, or with device=cpu")
    needed = model_rate(case)
    text = f"{made:,.0f} images/s, the model takes {needed:,.0f}"
    if made < needed:
        fix = "more cores, data.num_workers=auto, data.hw_decoder_load=auto, smaller stored images, or shards on a local disk"
        return warn(f"{text}: it would wait for data", fix)
    return ok(text)


def model_rate(case: Case) -> float:
    """Images/s of forward and backward passes on crops of noise, on the device of the run."""
    import torch

    from train.build import torch_threads
    from train.step import trial_step

    config = case.config
    assert config is not None
    device = torch.device("cuda", 0) if sees_gpu() and config.device != "cpu" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(torch_threads())
    _, step = trial_step(config, device)
    step()
    started, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < NEED_S or not steps:
        step()
        steps += 1
    return steps * config.data.batch_size / elapsed
