"""The trainings of the study: one trial and its scores, and the calibration of how many steps fill the budget."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from pipeline.memory import peak_memory
from tools.own_process import run_in_subprocess
from tools.studies.grid import BASE, CONTINUED, UNTOUCHED, Base
from tools.studies.peers import build_peer, peer_losses
from train.adapt.mix import best_share, mixtures
from train.adapt.weights import starting_encoder
from train.build import build_dataset, build_encoder, build_evaluation_loaders, build_model, build_training_loader
from train.config.load import load_config
from train.config.schema import Config
from train.config.yaml12 import changed_settings, flatten
from train.evaluation.dense import dense_figures, raw_patches
from train.evaluation.features import Extractor, colour_histogram, extract, pixels, pooled_features
from train.evaluation.measure import leave_one_out_hits, measure
from train.evaluation.placement import DenseExtractor, Placement, dense_features, patch_pixels
from train.trainer import Trainer

CALIBRATION_S, TURN_STEPS = 15.0, 12
MANY_EPOCHS = 100_000  # max_steps decides
MANY_STEPS = 10_000  # the budget decides
CPU = torch.device("cpu")
DENSE_PATCHES = 20_000  # of the training images, so that the dense probe takes seconds
# Settings that can differ between the calls of one study: where files are, and what each trial sets itself.
FREE_KEYS = (
    "device", "seed", "training.max_steps", "training.epochs", "checkpoint.", "logging.", "data.data_path",
    "evaluation.eval_frequency",
)  # fmt: skip


def trial_config(base: Base, variant: str, seed: int, max_steps: int) -> Config:
    settings = ("device=cpu", f"seed={seed}", f"training.max_steps={max_steps}", f"training.epochs={MANY_EPOCHS}")
    return load_config(Path(base.config), [*base.settings(variant), *settings])


class TimedTraining:
    """A variant's training by the product's trainer, on one thread of torch.

    `cpu_s` are the CPU seconds its steps took, of all threads of this process, including the loader's. Work between steps does
    not count, and neither do compiling the crop operator and starting DALI.
    """

    def __init__(self, config: Config, variant: str) -> None:
        torch.set_num_threads(1)
        dataset, hjepa = build_dataset(config), build_model(config, CPU)
        # A loader of its own, so that the trainer still starts with the first batch.
        warm_up = build_training_loader(config, dataset)
        next(iter(warm_up))
        warm_up.close()
        peer = build_peer(variant, config, hjepa.encoder, dataset.index)
        self.trainer = Trainer(config, model=peer or hjepa, loss_fn=peer_losses if peer else None)
        self.cpu_s = 0.0

    def step(self) -> float:
        """Take one step and return its CPU seconds."""
        started = time.process_time()
        self.trainer.train_step()
        self.trainer.monitor.read_counts()
        taken = time.process_time() - started
        self.cpu_s += taken
        return taken

    def run_to(self, step: int) -> None:
        self.trainer.model.train()
        while self.trainer.state.step < step and not self.trainer.diverged:
            self.step()


def run_trial(base: Base, variant: str, seed: int, steps: int, points: int = 1) -> list[dict[str, Any]]:
    """Train for `steps` and return a row of figures for each of `points` measurements, evenly spaced, the last at the end.

    Accuracies are percentages, times seconds, and memory MiB; times and memory are only in the last row.
    """
    config = trial_config(base, variant, seed, steps)
    before, rows = peak_memory(), []
    training, peak = TimedTraining(config, variant), 0.0
    trainer = training.trainer
    for point in range(1, points + 1):
        training.run_to(max(1, trainer.schedule.total_steps * point // points))
        peak = peak or peak_memory()  # later peaks can be those of an evaluation
        trainer.model.eval()
        encoder, pooled = trainer.model.target, dict[str, Extractor]()
        counts = {"steps": trainer.state.step, "images": trainer.state.images, "cpu_s": round(training.cpu_s, 2)}
        if trainer.start is not None:
            pooled["unmixed"] = pooled_features(encoder)
            encoder, counts["share"] = mixed_back(config, encoder, starting_encoder(config, CPU, trainer.start))
        pooled["trained"] = pooled_features(encoder)
        scores = measure_rows(config, pooled, {"trained": dense_features(encoder)}, base.masks)
        unmixed = {"unmixed": scores["unmixed"]["knn"]} if "unmixed" in scores else {}
        rows.append({**counts, **scores["trained"], **unmixed})
    rate = round(trainer.state.images / training.cpu_s, 1)
    rows[-1] |= {"images_per_cpu_s": rate, "peak_mib": round((peak - before) / 2**20, 1)}
    return rows


def mixed_back(config: Config, target: MultiCropEncoder, start: MultiCropEncoder) -> tuple[MultiCropEncoder, float]:
    """Return the mixture with the starting weights that a run would export, and the share of `target` in it."""
    encoders = mixtures(start, target)
    features = extract(build_evaluation_loaders(config)[0], {str(share): pooled_features(e) for share, e in encoders.items()})
    share = best_share({share: leave_one_out_hits(features[str(share)], config.evaluation.knn_k, CPU) for share in encoders})
    return encoders[share], share


def run_baselines(base: Base, seed: int) -> dict[str, dict[str, Any]]:
    """Return the scores of raw pixels, of the colour histogram, of the seed's random initialisation, and of untouched weights."""
    torch.set_num_threads(1)
    config = trial_config(base, BASE, seed, 1)
    untrained, name = build_model(config, CPU).eval().target, "random initialisation"
    rows = {"raw pixels": pixels, "colour histogram": colour_histogram, name: pooled_features(untrained)}
    patches = {"raw pixels": patch_pixels(untrained.patch_size), name: dense_features(untrained)}
    if base.weights:
        start = starting_encoder(trial_config(base, CONTINUED, seed, 1), CPU)
        rows[UNTOUCHED], patches[UNTOUCHED] = pooled_features(start), dense_features(start)
    return measure_rows(config, rows, patches, base.masks)


def measure_rows(
    config: Config, extractors: Mapping[str, Extractor], dense: Mapping[str, DenseExtractor], masks: str = ""
) -> dict[str, dict[str, Any]]:
    """Return k-NN, linear probe, RankMe and placement of each extractor's features on the validation split.

    With a folder of `masks`, the mean IoU of the dense probe is added.
    """
    k, epochs = config.evaluation.knn_k, config.evaluation.linear_epochs
    loaders = build_evaluation_loaders(config)
    scores = measure(loaders, extractors, CPU, ks=[k], linear_epochs=epochs, with_rankme=True)
    pairs = Placement(config, loaders[1].index)
    segmented: dict[str, dict[str, float]] = {name: {} for name in dense}
    if masks:
        patch = build_encoder(config).patch_size
        tokens = {name: raw_patches(patch) if name == "raw pixels" else extractor for name, extractor in dense.items()}
        for row in dense_figures(Path(masks), tokens, config, patch, CPU, DENSE_PATCHES):
            if row["probe"]:
                segmented[row["features"]][f"dense_{row['probe']}"] = round(row["miou"], 2)
    return {
        name: {
            "knn": round(score.knn["last"][k], 2),
            "linear": round(score.linear[0], 2) if score.linear else "",
            "rankme": round(score.rankme or 0.0, 1),
            "placement": round(pairs.measure(dense[name])["last"], 2) if name in dense else "",
            **segmented.get(name, {}),
        }
        for name, score in scores.items()
    }


def calibrate(path: Path, base: Base, budget: float, points: int, variants: Sequence[str]) -> dict[str, int]:
    """Return the steps that fill the budget by variant, measured once and kept in the file `path`.

    Raises ValueError if the file belongs to a study with other options or settings, whose rows could not be compared.
    """
    options, settings = {"budget_s": budget, "points": points}, load_config(Path(base.config), base.overrides).resolved
    saved = json.loads(path.read_text()) if path.exists() else {}
    record: dict[str, Any] = {**options, "settings": settings, "step_cpu_ms": {}, "steps": {}, **saved}
    before, after = flatten({**record["settings"], **{key: record[key] for key in options}}), flatten({**settings, **options})
    common = before.keys() & after.keys()  # another version can have other settings
    if changes := changed_settings({key: before[key] for key in common}, {key: after[key] for key in common}, FREE_KEYS):
        raise ValueError(f"{path}: belongs to another study ({'; '.join(changes)}); choose another --out, or move its files away")
    if missing := [name for name in variants if name not in record["steps"]]:
        timed = [BASE, *(name for name in missing if name != BASE)]
        seconds = run_in_subprocess(step_seconds, base, timed, budget)
        base_ms = record["step_cpu_ms"].get(BASE, 1000 * seconds[BASE])
        for name in missing:
            ms = base_ms * seconds[name] / seconds[BASE]
            record["step_cpu_ms"][name] = round(ms, 2)
            record["steps"][name] = max(1, round(1000 * budget / ms))
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record["steps"]


def step_seconds(base: Base, variants: Sequence[str], budget: float) -> dict[str, float]:
    """Return the CPU seconds of one step of each variant.

    The variants take turns of a few steps: other work on the machine slows all of them alike, so that the median of the
    ratios to the first one holds. Turns end when the first variant has used `CALIBRATION_S`, or the budget if that is less.
    """
    trainings = {name: TimedTraining(trial_config(base, name, 0, MANY_STEPS), name) for name in variants}
    turns: list[dict[str, float]] = []
    first = variants[0]
    while len(turns) < 2 or trainings[first].cpu_s < min(CALIBRATION_S, budget):
        turns.append({})
        for name, training in trainings.items():
            training.step()  # not timed: the previous variant's loader can still be prefetching
            turns[-1][name] = sum(training.step() for _ in range(TURN_STEPS)) / TURN_STEPS
    timed = turns[1:]  # the first turn warms up
    seconds = statistics.median(turn[first] for turn in timed)
    return {name: seconds * statistics.median(turn[name] / turn[first] for turn in timed) for name in variants}
