"""One training of the study, in a process of its own: its figures as one row."""

import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from model.hjepa import HJEPA
from train.build import build_evaluation_loaders, build_model
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.features import Extractor, Features, extract, pixels, pooled_features
from train.evaluation.knn import knn_accuracies
from train.evaluation.probes import linear_probe
from train.memory import measure_step
from train.monitor import RunState
from train.output.log import rankme
from train.trainer import Trainer

WARM_STEPS, TIMED_STEPS = 8, 24  # of a calibration
MANY_EPOCHS = 100_000  # max_steps decides
CPU = torch.device("cpu")


def study_config(base: str, overrides: tuple[str, ...], seed: int, max_steps: int) -> Config:
    settings = ("device=cpu", f"seed={seed}", f"training.max_steps={max_steps}", f"training.epochs={MANY_EPOCHS}")
    return load_config(Path(base), [*overrides, *settings])


def train_model(config: Config) -> tuple[HJEPA, RunState, list[float]]:
    """The trained model, its state, and the process's CPU seconds at the start and after each step."""
    torch.set_num_threads(1)
    trainer, clock = Trainer(config), [time.process_time()]
    while not trainer.complete and not trainer.diverged:
        trainer.step()
        clock.append(time.process_time())
    return trainer.model, trainer.state, clock


def step_seconds(base: str, overrides: tuple[str, ...]) -> float:
    """CPU seconds of one step, all threads of the process: the median over steps, which a busy machine moves least."""
    _, _, clock = train_model(study_config(base, overrides, 0, WARM_STEPS + TIMED_STEPS))
    times = [after - before for before, after in pairwise(clock)]
    return statistics.median(times[WARM_STEPS:])


def run_trial(base: str, overrides: tuple[str, ...], seed: int, steps: int) -> dict[str, Any]:
    """Train for `steps` and measure: accuracies in percent, times in seconds, memory in MiB."""
    config = study_config(base, overrides, seed, steps)
    before, started = peak_mib(), time.perf_counter()
    model, state, clock = train_model(config)
    cpu_s, wall_s, peak = clock[-1] - clock[0], time.perf_counter() - started, peak_mib()
    figures = measure(config, {"trained": pooled_features(model.target)}, model)["trained"]
    return {
        "steps": state.step,
        "images": state.images,
        "cpu_s": round(cpu_s, 1),
        "wall_s": round(wall_s, 1),
        "images_per_cpu_s": round(state.images / cpu_s, 1),
        "peak_mib": round(peak - before, 1),
        "step_mib": round(kept_mib(config), 2),
        **figures,
    }


def run_baselines(base: str, seed: int) -> dict[str, dict[str, Any]]:
    """Raw pixels and the seed's random initialisation."""
    torch.set_num_threads(1)
    config = study_config(base, (), seed, 1)
    model = build_model(config, CPU)
    return measure(config, {"raw pixels": pixels, "random initialisation": pooled_features(model.target)}, model)


def measure(config: Config, rows: dict[str, Extractor], model: HJEPA) -> dict[str, dict[str, Any]]:
    """k-NN, linear probe and RankMe of each row's features, on the validation split."""
    model.eval()
    train, test = (extract(loader, rows) for loader in build_evaluation_loaders(config))
    return {name: _figures(config, train[name], test[name]) for name in rows}


def _figures(config: Config, train: Features, test: Features) -> dict[str, Any]:
    k = config.evaluation.knn_k
    knn = knn_accuracies(train.values["last"], train.labels, test.values["last"], test.labels, [k])[k]
    linear, _ = linear_probe(train, test, ["last"], config.evaluation.linear_epochs, CPU)
    return {"knn": round(knn, 2), "linear": round(linear, 2), "rankme": round(rankme(test.values["last"]), 1)}


def kept_mib(config: Config) -> float:
    """What a step of one batch keeps: weights, gradients, moments, and the activations for the backward pass."""
    return measure_step(config, amp=False).total(config.data.batch_size, config.data.crop_counts[1]) / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
