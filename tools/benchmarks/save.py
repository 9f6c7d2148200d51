"""What a save costs: the steps while a thread writes the checkpoint, against writing it in the loop."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset import resolve_device
from tools.benchmarks.tables import target
from train.build import trial_step
from train.checkpoint import CheckpointWriter, take_snapshot, write_checkpoint
from train.config.load import load_config
from train.config.schema import Config
from train.optim import build_optimizer

CONFIG = Path(__file__).parents[2] / "configs" / "multicrop_training.yaml"
MOST = 1.05  # of a step without a save


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"Settings that replace those of {CONFIG.name}."
    )
    command.add_argument(
        "--saves", type=int, default=5, help="How often to save; medians are printed. The default is %(default)s."
    )
    command.add_argument(
        "--steps",
        type=int,
        default=4,
        help="How many steps to take with a save and without. The default is %(default)s.",
    )
    command.add_argument("--threads", type=int, default=1, help="The threads of torch. The default is %(default)s.")


def run(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    figures = measure(load_config(CONFIG, given.overrides), given.saves, given.steps)
    report(figures)
    return figures


def measure(config: Config, saves: int, steps: int) -> dict[str, Any]:
    """`step_s`, `after_s` (of each step after a save; the first includes it), `written_in_loop_s`, `bytes`."""
    model, step = trial_step(config, torch.device("cuda" if resolve_device(config.device) == "gpu" else "cpu"))
    optimizer = build_optimizer(model, config.training.weight_decay, config.training.betas, config.training.optimizer)

    def timed(save: CheckpointWriter | None, number: int) -> float:
        started = time.perf_counter()
        if save is not None:
            save.write(take_snapshot(model, optimizer, {"step": number, "score": None}))
        step()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    plain: list[float] = []
    after: list[list[float]] = [[] for _ in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 1, 0)
        timed(None, 0)
        for number in range(saves):
            plain += [timed(None, 0) for _ in range(steps)]
            for place, times in enumerate(after):
                times.append(timed(None if place else writer, number))
            writer.wait()
        started = time.perf_counter()
        path = write_checkpoint(Path(folder), take_snapshot(model, optimizer, {"step": saves, "score": None}))
        in_loop = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.iterdir())
    return {
        "step_s": statistics.median(plain),
        "after_s": [statistics.median(times) for times in after],
        "written_in_loop_s": in_loop,
        "bytes": size,
    }


def report(figures: dict[str, Any]) -> None:
    step_s = figures["step_s"]
    print(f"a step {step_s * 1e3:.0f} ms; a checkpoint of {figures['bytes'] / 2**20:.0f} MiB")
    for number, time_s in enumerate(figures["after_s"], 1):
        print(target(f"step {number} after a save / a step without", time_s / step_s, "<=", MOST))
    print(f"written in the loop, it would take the time of {figures['written_in_loop_s'] / step_s:.2f} steps")
