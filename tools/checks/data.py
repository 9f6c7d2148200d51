"""Checks of the shards, and of the pipeline's rate against the model's."""

import random
import time
from collections.abc import Callable
from functools import cache

from pipeline.files import file_checksum
from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.manifest import MANIFEST_NAME, check_class_count, read_manifest
from tools.checks.check import Case, Check, Finding, fail, ok, sees_gpu, skip, warn

SAMPLED_SHARDS, SAMPLED_IMAGES = 8, 32
WARM_UP_STEPS, RATE_S = 3, 3.0
MAX_WAIT = 0.1  # share of the time; less is noise
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


def with_index(check: Callable[[Case, ShardIndex], Finding], needs_config: bool = False) -> Callable[[Case], Finding]:
    """Return a check that is skipped without a readable training split or, where it is needed, without a config."""

    def find(case: Case) -> Finding:
        index = read_index(case, "train")
        if index is None or (needs_config and case.config is None):
            return skip("no readable shards, or no CONFIG")
        return check(case, index)

    return find


def check_index(case: Case) -> Finding:
    if case.data is None:
        return skip("no CONFIG and no --data")
    index = opened(case.dataset, case.data, "train")
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards")


def check_manifest(_: Case, index: ShardIndex) -> Finding:
    """Compare the manifest with the index and, in one small shard chosen at random, with the checksum."""
    manifest = read_manifest(index.folder)
    if manifest is None:
        return skip("no manifest next to the shards")
    check_class_count(index.folder, index.samples["label"], manifest)
    if differing := set(manifest.checksums) ^ set(index.shards):
        raise ValueError(f"only one of {MANIFEST_NAME} and the index has {min(differing)}")
    if manifest.num_samples not in (None, len(index)):
        raise ValueError(f"{MANIFEST_NAME} lists {manifest.num_samples:,} images, the index {len(index):,}")
    text = f"{len(index.shards)} shards, {len(index):,} images, as indexed"
    if index.remote is not None:
        return ok(f"{text}; checksums are verified when shards are downloaded")
    count = len(index.shards)
    sampled = [index.shard_path(shard) for shard in random.sample(range(count), min(SAMPLED_SHARDS, count))]
    path = min(sampled, key=lambda path: path.stat().st_size)
    if file_checksum(path) != manifest.checksums[path.name]:
        return fail(f"{path}: sha256 differs from {MANIFEST_NAME}", COPY_AGAIN)
    return ok(f"{text}; {path.name} has its checksum")


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
        return skip("no val split")
    features.check_classes(index, val)
    if problems.unknown:
        return warn(problems.unknown, "leave those images out of val, or add some of their classes to train")
    return ok("each label means the same class in train and val")


def check_rate(case: Case, _: ShardIndex) -> Finding:
    """Take training steps for a few seconds, and compare the time in which they wait for data with the rest."""
    import torch

    from train.build import torch_threads
    from train.trainer import Trainer

    assert case.config is not None
    if not sees_gpu() and case.config.device != "cpu":
        return skip("training steps are measured on a GPU, or with device=cpu")
    if not case.uses_gpu:
        torch.set_num_threads(torch_threads(case.config))
    trainer = Trainer(case.config)
    for _step in range(WARM_UP_STEPS):  # the first one allocates, and compiles
        trainer.train_step()
    images, waited, started = trainer.state.images, trainer.state.wait_s, time.perf_counter()
    while time.perf_counter() - started < RATE_S:
        trainer.train_step()
        if case.uses_gpu:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    share = (trainer.state.wait_s - waited) / seconds
    text = f"{(trainer.state.images - images) / seconds:,.0f} images/s, {share:.0%} of the time waiting for data"
    if share > MAX_WAIT:
        fix = "more cores, data.num_workers=auto, data.hw_decoder_load=auto, images stored smaller, or shards on a local disk"
        return warn(text, fix)
    return ok(text)


DATA_CHECKS = {
    "shards: index": Check(check_index, VERIFY),
    "shards: manifest": Check(
        with_index(check_manifest), "copy the folder again; if the manifest is old: tools/make_shards.py index FOLDER"
    ),
    "shards: sampled images": Check(with_index(check_images)),
    "shards: classes": Check(
        with_index(check_labels), "remove the val shards and convert val again next to train, with the same --out"
    ),
    "pipeline rate": Check(with_index(check_rate, needs_config=True)),
}
