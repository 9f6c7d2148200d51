"""One training of the study, in a process of its own: its figures as rows."""

import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.teacher import TaughtEncoder
from tools.studies.grid import BASE, Base
from tools.studies.peers import build_peer, peer_losses
from train.build import build_dataset, build_evaluation_loaders, build_model
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.features import Extractor, Features, colour_histogram, extract, pixels, pooled_features
from train.evaluation.measure import knn_accuracies, linear_probe, rankme
from train.trainer import Trainer

CALIBRATION_S, TURN_STEPS = 15.0, 12
MANY_EPOCHS = 100_000  # max_steps decides
MANY_STEPS = 10_000  # the budget decides
CPU = torch.device("cpu")


def study_config(base: Base, variant: str, seed: int, max_steps: int) -> Config:
    settings = ("device=cpu", f"seed={seed}", f"training.max_steps={max_steps}", f"training.epochs={MANY_EPOCHS}")
    return load_config(Path(base.config), [*base.settings(variant), *settings])


class Training:
    """A variant's training by the product's step, on one thread of torch.

    `cpu_s` and `wall_s` are what its steps took: for the CPU, all threads of this process, the loader's too. What happens
    between steps does not count, nor does the loader's start; the few batches that it then makes ahead come free.
    """

    def __init__(self, config: Config, variant: str) -> None:
        torch.set_num_threads(1)
        hjepa = build_model(config, CPU)
        peer = build_peer(variant, config, hjepa.encoder, build_dataset(config).index)
        self._trainer = Trainer(config, model=peer or hjepa, loss_fn=peer_losses if peer else None)
        self.model, self.state = self._trainer.model, self._trainer.state
        self.steps = self._trainer.schedule.total_steps
        self.cpu_s = self.wall_s = 0.0

    def step(self) -> float:
        """Take one step. Returns its CPU seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._trainer.train_step()
        self._trainer.read_counts()
        taken = time.process_time() - cpu
        self.cpu_s, self.wall_s = self.cpu_s + taken, self.wall_s + time.perf_counter() - wall
        return taken

    def run_to(self, step: int) -> None:
        self.model.train()
        while self.state.step < step and not self._trainer.diverged:
            self.step()


def step_seconds(base: Base, variants: Sequence[str], budget: float) -> dict[str, float]:
    """CPU seconds of one step of each variant, all threads of the process.

    The variants, the first of which is the measure of all, take turns with a few steps each: another job on the machine slows
    all of them alike, so the median of their ratios is theirs. Turns end when the first has used `CALIBRATION_S`, or the budget
    if that is less. The first turn warms up, and the first step of a turn is not timed: the loader of the variant before may
    still make its next batch.
    """
    trainings = {name: Training(study_config(base, name, 0, MANY_STEPS), name) for name in variants}
    turns: list[dict[str, float]] = []
    first = variants[0]
    while len(turns) < 2 or trainings[first].cpu_s < min(CALIBRATION_S, budget):
        turns.append({})
        for name, training in trainings.items():
            training.step()
            turns[-1][name] = sum(training.step() for _ in range(TURN_STEPS)) / TURN_STEPS
    timed = turns[1:]
    seconds = statistics.median(turn[first] for turn in timed)
    return {name: seconds * statistics.median(turn[name] / turn[first] for turn in timed) for name in variants}


def run_trial(base: Base, variant: str, seed: int, steps: int, points: int = 1) -> list[dict[str, Any]]:
    """Train for `steps` and measure `points` times, evenly spaced, last at the end: a row of figures for each.

    Accuracies in percent, times in seconds, memory in MiB, which is in the last row alone.
    """
    config = study_config(base, variant, seed, steps)
    before, rows = peak_mib(), []
    training, peak = Training(config, variant), 0.0
    for point in range(1, points + 1):
        training.run_to(max(1, training.steps * point // points))
        if point == 1:
            peak = peak_mib()  # later ones may be those of an evaluation
        rows.append(
            {
                "steps": training.state.step,
                "images": training.state.images,
                "cpu_s": round(training.cpu_s, 2),
                **measure(config, {"trained": pooled_features(training.model.target)}, training.model)["trained"],
            }
        )
    rows[-1] |= {
        "wall_s": round(training.wall_s, 1),
        "images_per_cpu_s": round(training.state.images / training.cpu_s, 1),
        "peak_mib": round(peak - before, 1),
    }
    return rows


def run_baselines(base: Base, seed: int) -> dict[str, dict[str, Any]]:
    """Raw pixels, the colour histogram and the seed's random initialisation."""
    torch.set_num_threads(1)
    config = study_config(base, BASE, seed, 1)
    model = build_model(config, CPU)
    untrained = pooled_features(model.target)
    rows = {"raw pixels": pixels, "colour histogram": colour_histogram, "random initialisation": untrained}
    return measure(config, rows, model)


def measure(config: Config, rows: dict[str, Extractor], model: TaughtEncoder) -> dict[str, dict[str, Any]]:
    """k-NN, linear probe and RankMe of each row's features, on the validation split."""
    model.eval()
    train, test = (extract(loader, rows) for loader in build_evaluation_loaders(config))
    return {name: _figures(config, train[name], test[name]) for name in rows}


def _figures(config: Config, train: Features, test: Features) -> dict[str, Any]:
    k = config.evaluation.knn_k
    knn = knn_accuracies(train.values["last"], train.labels, test.values["last"], test.labels, [k], CPU)[k]
    linear, _ = linear_probe(train, test, ["last"], config.evaluation.linear_epochs, CPU)
    return {"knn": round(knn, 2), "linear": round(linear, 2), "rankme": round(rankme(test.values["last"]), 1)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
