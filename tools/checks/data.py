"""Checks of the shards, and of the pipeline's images/s against the model's."""

import hashlib
import json
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.object_store import is_remote
from tools.checks.check import Case, Finding, check, fail, ok, sees_gpu, skipped, warn

MANIFEST = "manifest.json"
SAMPLED_SHARDS, SAMPLED_IMAGES = 8, 32
MOST_HASHED = 2 * 2**30
RATE_S, NEED_S = 3.0, 1.0
NO_DATA, NO_MANIFEST = "no CONFIG and no --data", "no manifest beside the shards"
COPY_AGAIN = "copy the shard again, or convert again; all shards: python tools/make_shards.py verify FOLDER"


@cache
def opened(dataset: str, data: str) -> ShardIndex:
    return open_index(split_folder(dataset, data, "train"))


def index_of(case: Case) -> ShardIndex | None:
    """Of the training split; None where it cannot be read: the check of the index says why."""
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


def manifest_beside(index: ShardIndex | None) -> dict[str, Any] | None:
    if index is None or is_remote(index.folder) or not (Path(index.folder) / MANIFEST).exists():
        return None
    return json.loads((Path(index.folder) / MANIFEST).read_text())


@check("shards: manifest")
def manifest(case: Case) -> Finding:
    index = index_of(case)
    content = manifest_beside(index)
    if index is None or content is None:
        return skipped(NO_MANIFEST)
    listed, found = {entry["name"] for entry in content["shards"]}, set(index.shards)
    if listed != found:
        text = f"{len(listed)} shards are listed, {len(found)} are indexed; only one of them has {min(listed ^ found)}"
        return fail(text, "copy the whole folder again or, if the manifest is old: tools/make_shards.py index FOLDER")
    if content["num_samples"] != len(index):
        text = f"{content['num_samples']:,} images are listed, {len(index):,} are indexed"
        return fail(text, f"python tools/make_shards.py index {index.folder}")
    return ok(f"{len(listed)} shards, {content['num_samples']:,} images, as indexed")


@check("shards: a sampled checksum")
def checksum(case: Case) -> Finding:
    """The smallest of a few shards, drawn anew each time so that several runs look at several."""
    index = index_of(case)
    content = manifest_beside(index)
    if index is None or content is None:
        return skipped(NO_MANIFEST)
    sums = {Path(index.folder) / entry["name"]: entry["sha256"] for entry in content["shards"]}
    there = sorted(path for path in sums if path.exists())
    drawn = random.sample(there, min(SAMPLED_SHARDS, len(there)))
    path = min(drawn, key=lambda path: path.stat().st_size)
    if path.stat().st_size > MOST_HASHED:
        return skipped(f"{path.name} is too large to read here; python tools/make_shards.py verify {index.folder}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sums[path]:
            return fail(f"{path}: sha256 differs from {MANIFEST}", COPY_AGAIN)
    return ok(path.name)


@check("shards: sampled images")
def sampled_images(case: Case) -> Finding:
    """With the training's decoder, on the CPU."""
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
        return skipped("no CONFIG, or no readable shards")
    from pipeline.tuning import measure
    from train.build import build_dataset, build_loader

    config = case.config
    batch_size = min(config.data.batch_size, 32, len(index))
    loader = build_loader(config, build_dataset(config), batch_size, normalized=False)
    made = measure(loader, RATE_S)
    if not sees_gpu() and config.device != "cpu":
        return ok(f"{made:,.0f} images/s; the model is measured on a GPU, or with device=cpu")
    needed = model_rate(case)
    text = f"the pipeline makes {made:,.0f} images/s, the model takes {needed:,.0f}"
    if made < needed:
        fix = "more cores, data.num_workers=auto, data.hw_decoder_load=auto, images stored smaller, or shards on a local disk"
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
