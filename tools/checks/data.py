"""Checks of the shards, and of the pipeline's images/s against the model's."""

import hashlib
import random
import time
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.manifest import MANIFEST_NAME, Manifest, check_class_count, read_manifest
from tools.checks.check import Case, Finding, check, fail, ok, sees_gpu, skipped, warn
from train.evaluation.labels import check_classes, one_label, unknown_labels

if TYPE_CHECKING:
    from pipeline.loader import MultiCropLoader

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


def manifest_beside(index: ShardIndex | None) -> Manifest | None:
    return None if index is None else read_manifest(index.folder)


@check("shards: manifest")
def manifest(case: Case) -> Finding:
    index = index_of(case)
    try:
        content = manifest_beside(index)
        if index is None or content is None:
            return skipped(NO_MANIFEST)
        check_class_count(index.folder, index.samples["label"], content)
    except ValueError as error:
        return fail(str(error), "copy the manifest again, or convert again")
    listed, found = set(content.checksums), set(index.shards)
    if listed != found:
        text = f"{len(listed)} shards are listed, {len(found)} are indexed; only one of them has {min(listed ^ found)}"
        return fail(text, "copy the whole folder again or, if the manifest is old: tools/make_shards.py index FOLDER")
    if content.num_samples not in (None, len(index)):
        text = f"{content.num_samples:,} images are listed, {len(index):,} are indexed"
        return fail(text, f"python tools/make_shards.py index {index.folder}")
    return ok(f"{len(listed)} shards, {len(index):,} images, as indexed")


@check("shards: a sampled checksum")
def checksum(case: Case) -> Finding:
    """The smallest of a few shards, drawn anew each time so that several runs look at several."""
    index = index_of(case)
    content = manifest_beside(index)
    if index is None or content is None or not content.checksums:
        return skipped(NO_MANIFEST)
    if index.remote is not None:
        return skipped("shards of a store are checked when they are fetched")
    sums = {Path(index.folder) / name: checksum for name, checksum in content.checksums.items()}
    there = sorted(path for path in sums if path.exists())
    drawn = random.sample(there, min(SAMPLED_SHARDS, len(there)))
    path = min(drawn, key=lambda path: path.stat().st_size)
    if path.stat().st_size > MOST_HASHED:
        return skipped(f"{path.name} is too large to read here; python tools/make_shards.py verify {index.folder}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sums[path]:
            return fail(f"{path}: sha256 differs from {MANIFEST_NAME}", COPY_AGAIN)
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


@check("shards: classes")
def classes(case: Case) -> Finding:
    """Labels of train against those of val: one that means another class, or none, and one label for all images."""
    index = index_of(case)
    if index is None:
        return skipped("no index")
    if fault := one_label(index):
        return warn(fault, "convert the folder whose folders are the classes; without classes, ignore all accuracies")
    val = validation_index(case)
    if val is None:
        return skipped("no val split")
    try:
        check_classes(index, val)
    except ValueError as error:
        return fail(str(error), "remove the val shards and convert val again beside train, with the same --out")
    if unknown := unknown_labels(index, val):
        return warn(unknown, "leave those images out of val, or add some of their classes to train")
    return ok("each label means the same class in train and val")


def validation_index(case: Case) -> ShardIndex | None:
    try:
        folder = split_folder(_dataset(case), case.data, "val") if case.data else None
    except (ValueError, OSError):
        return None
    index = index_of(case)
    return None if folder is None or index is None or folder == index.folder else open_index(folder)


@check("run: data")
def run_data(case: Case) -> Finding:
    """Whether what the run's folder holds was trained and measured on these shards."""
    index = index_of(case)
    if index is None or case.config is None:
        return skipped("no CONFIG, or no readable shards")
    from train.evaluation.features import subsample_evenly
    from train.evaluation.online import BASELINES_FILE, baselines_key, read_baselines
    from train.output.folder import check_run_folder, run_folder

    config = case.config
    try:
        check_run_folder(config, index.digest)
    except ValueError as error:
        return fail(str(error), "data.data_path=OLD_SHARDS, another logging.run_name, or checkpoint.resume=none")
    path, val = run_folder(config) / BASELINES_FILE, validation_index(case)
    if val is None or not path.exists():
        return ok("no run, or none that was measured, is in its folder")
    used = [subsample_evenly(each, config.evaluation.max_samples) for each in (index, val)]
    key = baselines_key(used[0], used[1], config.evaluation)
    fix = "the same training command measures them again; until then, do not compare with summary.json and report.md"
    try:
        if read_baselines(path, key) is None:
            return warn(f"{path}: baselines of other images or evaluation settings than these", fix)
    except ValueError as error:
        return warn(str(error), fix)
    return ok(f"{path}: measured on these images")


@check("pipeline rate")
def rate(case: Case) -> Finding:
    """Images/s of the pipeline alone, against a forward and backward pass of the model alone."""
    index = index_of(case)
    if index is None or case.config is None:
        return skipped("no CONFIG, or no readable shards")
    from train.build import build_dataset, build_loader

    config = case.config
    batch_size = min(config.data.batch_size, 32, len(index))
    loader = build_loader(config, build_dataset(config), batch_size, normalized=False)
    made = images_per_second(loader, RATE_S)
    if not sees_gpu() and config.device != "cpu":
        return ok(f"{made:,.0f} images/s; the model is measured on a GPU, or with device=cpu")
    needed = model_rate(case)
    text = f"the pipeline makes {made:,.0f} images/s, the model takes {needed:,.0f}"
    if made < needed:
        fix = "more cores, data.num_workers=auto, data.hw_decoder_load=auto, images stored smaller, or shards on a local disk"
        return warn(f"{text}: it would wait for data", fix)
    return ok(text)


def images_per_second(loader: "MultiCropLoader", seconds: float) -> float:
    """The loader's rate after three batches of warm-up."""
    images, started = 0, 0.0
    for number, batch in enumerate(chain.from_iterable(repeat(loader)), 1):
        if number == 3:
            started = time.perf_counter()
        if number <= 3:
            continue
        images += len(batch.labels)
        if number >= 7 and time.perf_counter() - started >= seconds:
            break
    return images / (time.perf_counter() - started)


def model_rate(case: Case) -> float:
    """Images/s of forward and backward passes on crops of noise, on the device of the run."""
    import torch

    from train.build import torch_threads, trial_step

    config = case.config
    assert config is not None
    device = torch.device("cuda", 0) if sees_gpu() and config.device != "cpu" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(torch_threads(config))
    _, step = trial_step(config, device)
    step()
    started, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < NEED_S or not steps:
        step()
        steps += 1
    return steps * config.data.batch_size / elapsed
