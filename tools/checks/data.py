"""Checks of the shards, of the data a run was trained on, and of the pipeline's rate against the model's."""

import hashlib
import random
import time
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path

from pipeline.shards.index import ShardIndex, open_index, split_folder
from pipeline.shards.manifest import MANIFEST_NAME, check_class_count, read_manifest
from tools.checks.check import Case, CheckList, Finding, fail, ok, sees_gpu, skip, warn

SAMPLED_SHARDS, SAMPLED_IMAGES = 8, 32
MAX_HASHED_BYTES = 2 * 2**30
WARM_UP_BATCHES, RATE_S, MODEL_S = 3, 3.0, 1.0
COPY_AGAIN = "copy the shard again, or convert again; all shards: python tools/make_shards.py verify FOLDER"


@cache
def opened(dataset: str, data: str) -> ShardIndex:
    return open_index(split_folder(dataset, data, "train"))


def dataset_name(case: Case) -> str:
    return case.config.data.dataset if case.config is not None else "custom"


def training_index(case: Case) -> ShardIndex | None:
    """Return the index of the training split; None if it cannot be read: `check_index` says why."""
    try:
        return opened(dataset_name(case), case.data) if case.data else None
    except (ValueError, OSError):
        return None


def validation_index(case: Case) -> ShardIndex | None:
    try:
        folder = split_folder(dataset_name(case), case.data, "val") if case.data else None
    except (ValueError, OSError):
        return None
    index = training_index(case)
    return None if folder is None or index is None or folder == index.folder else open_index(folder)


def check_index(case: Case) -> Finding:
    if case.data is None:
        return skip("no CONFIG and no --data")
    try:
        index = opened(dataset_name(case), case.data)
    except (ValueError, OSError) as error:
        return fail(str(error), f"python tools/make_shards.py verify {case.data}")
    return ok(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards")


def check_manifest(case: Case) -> Finding:
    """Compare the manifest with the index and, in one small shard chosen at random, with the checksum."""
    index = training_index(case)
    try:
        manifest = None if index is None else read_manifest(index.folder)
        if index is None or manifest is None:
            return skip("no manifest next to the shards")
        check_class_count(index.folder, index.samples["label"], manifest)
    except ValueError as error:
        return fail(str(error), "copy the manifest again, or convert again")
    listed, indexed = set(manifest.checksums), set(index.shards)
    if listed != indexed:
        text = (
            f"{len(listed)} shards are listed, {len(indexed)} are indexed; only one of them has {min(listed ^ indexed)}"
        )
        return fail(
            text, "copy the complete folder again or, if the manifest is old: tools/make_shards.py index FOLDER"
        )
    if manifest.num_samples not in (None, len(index)):
        text = f"{manifest.num_samples:,} images are listed, {len(index):,} are indexed"
        return fail(text, f"python tools/make_shards.py index {index.folder}")
    text = f"{len(listed)} shards, {len(index):,} images, as indexed"
    if index.remote is not None:
        return ok(f"{text}; checksums are verified when shards are downloaded")
    sampled = [Path(index.folder) / name for name in random.sample(sorted(listed), min(SAMPLED_SHARDS, len(listed)))]
    path = min(sampled, key=lambda path: path.stat().st_size)
    if path.stat().st_size > MAX_HASHED_BYTES:
        return ok(f"{text}; too large for checksums here: python tools/make_shards.py verify {index.folder}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.checksums[path.name]:
            return fail(f"{path}: sha256 differs from {MANIFEST_NAME}", COPY_AGAIN)
    return ok(f"{text}; {path.name} has its checksum")


def check_images(case: Case) -> Finding:
    """Decode some images with the training's decoder, on the CPU."""
    index = training_index(case)
    if index is None:
        return skip("no index")
    from tools.shards.decode_check import decode_errors

    rows = random.sample(range(len(index)), min(SAMPLED_IMAGES, len(index)))
    images = [(index.encoded(row), int(index.samples[row]["height"]), int(index.samples[row]["width"])) for row in rows]
    bad = [(row, error) for row, error in zip(rows, decode_errors(images), strict=True) if error]
    if bad:
        return fail(f"{len(bad)} of {len(rows)}: {index.describe(bad[0][0])}: {bad[0][1]}", COPY_AGAIN)
    return ok(f"{len(rows)} decoded to their indexed sizes")


def check_labels(case: Case) -> Finding:
    """Compare the classes of train and val: a label must mean the same in both, and there must be several."""
    from train.evaluation import features

    index = training_index(case)
    if index is None:
        return skip("no index")
    val = validation_index(case)
    problems = features.check_labels(index, index if val is None else val)
    if problems.one_label:
        fix = "convert the folder whose folders are the classes; without classes, ignore all accuracies"
        return warn(problems.one_label, fix)
    if val is None:
        return skip("no val split")
    try:
        features.check_classes(index, val)
    except ValueError as error:
        return fail(str(error), "remove the val shards and convert val again next to train, with the same --out")
    if problems.unknown:
        return warn(problems.unknown, "leave those images out of val, or add some of their classes to train")
    return ok("each label means the same class in train and val")


def check_run_data(case: Case) -> Finding:
    """Check that the run in the run folder was trained and measured on these shards."""
    index = training_index(case)
    if index is None or case.config is None:
        return skip("no CONFIG, or no readable shards")
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
        return ok("there is no run in its folder, or none that was measured")
    used = [subsample_evenly(split, config.evaluation.max_samples) for split in (index, val)]
    fix = "the same training command measures them again; until then, do not compare with summary.json and report.md"
    try:
        if read_baselines(path, baselines_key(used[0], used[1], config.evaluation)) is None:
            return warn(f"{path}: baselines of other images or evaluation settings than these", fix)
    except ValueError as error:
        return warn(str(error), fix)
    return ok(f"{path}: measured on these images")


def check_rate(case: Case) -> Finding:
    """Compare the images/s of the pipeline with those that training steps take, without their waits for data."""
    index = training_index(case)
    if index is None or case.config is None:
        return skip("no CONFIG, or no readable shards")
    from train.build import build_dataset, build_loader

    config = case.config
    batch_size = min(config.data.batch_size, 32, len(index))
    loader = build_loader(config, build_dataset(config), batch_size, normalized=False)
    batches = chain.from_iterable(repeat(loader))
    for _ in islice(batches, WARM_UP_BATCHES):
        pass
    # The pipeline without a model.
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < RATE_S:
        images += len(next(batches).labels)
    made = images / (time.perf_counter() - started)
    loader.close()
    if not sees_gpu() and config.device != "cpu":
        return ok(f"{made:,.0f} images/s; the model is measured on a GPU, or with device=cpu")
    needed = model_rate(case)
    text = f"the pipeline makes {made:,.0f} images/s, the model takes {needed:,.0f}"
    if made < needed:
        fix = "more cores, data.num_workers=auto, data.hw_decoder_load=auto, images stored smaller, or shards on a local disk"
        return warn(f"{text}: it would wait for data", fix)
    return ok(text)


def model_rate(case: Case) -> float:
    """Return the images/s of training steps without their waits for data, on the device of the run."""
    import torch

    from train.build import torch_threads
    from train.trainer import Trainer

    assert case.config is not None
    if not case.uses_gpu:
        torch.set_num_threads(torch_threads(case.config))
    trainer = Trainer(case.config)
    trainer.train_step()  # the first one allocates, and compiles
    images, waited, started = trainer.state.images, trainer.state.wait_s, time.perf_counter()
    while time.perf_counter() - started < MODEL_S:
        trainer.train_step()
        if case.uses_gpu:
            torch.cuda.synchronize()
    busy_s = time.perf_counter() - started - (trainer.state.wait_s - waited)
    return (trainer.state.images - images) / busy_s


DATA_CHECKS: CheckList = (
    ("shards: index", check_index),
    ("shards: manifest", check_manifest),
    ("shards: sampled images", check_images),
    ("shards: classes", check_labels),
    ("run: data", check_run_data),
    ("pipeline rate", check_rate),
)
