"""One run, from its settings to its pictures. `train/run.py` is the command in front of it."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset
from pipeline.loader import MultiCropLoader
from pipeline.quarantine import Quarantine
from train.build import (
    build_dataset,
    build_loader,
    build_masks,
    build_model,
    loop_settings,
    torch_device,
    torch_threads,
    tuned_reader,
)
from train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from train.config import Config
from train.display import Display, summary_table
from train.loop import LoopSettings, gone_wrong, train_steps
from train.metrics import MetricsLog
from train.optim import build_optimizer
from train.probe import Probe
from train.report import draw_figures, write_summary
from train.run_folder import StopSignal, open_run_folder
from train.state import RunState

STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on from it
DIVERGED = 3  # too many steps without finite numbers; the last checkpoint is sound


@dataclass
class Session:
    """The parts of a run; `state` is replaced when a checkpoint is loaded."""

    config: Config
    console: Console
    folder: Path
    dataset: MultiCropDataset
    loader: MultiCropLoader
    model: HJEPA
    masks: MultiCropMaskGenerator
    optimizer: torch.optim.Optimizer
    settings: LoopSettings
    probe: Probe
    state: RunState

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def save(self) -> None:
        saved = {"step": self.state.step, "run": self.state.as_dict(), "loader": self.loader.state_dict()}
        save_checkpoint(self.checkpoints, self.model, self.optimizer, saved, self.config.checkpoint.keep_last_n)

    def restore(self, path: Path) -> None:
        """Raises ValueError when the checkpoint is damaged or of another architecture."""
        saved = load_checkpoint(path, self.model, self.optimizer)
        self.state = RunState(**saved["run"])
        self.state.skipped_in_a_row = 0  # or a run that ended for it could never be tried again
        self.loader.load_state_dict(saved["loader"])
        self.say(f"going on from {path} (step {self.state.step} of {self.settings.total_steps})")


def run(config: Config, console: Console) -> int:
    """Train, evaluate and draw; returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("torchrun: several ranks are not supported yet; start one process")
    session = prepare(config, console)
    with StopSignal(console.print) as stop:
        code = train(session, stop)
    return code if code else finish(session)


def prepare(config: Config, console: Console) -> Session:
    """Build every part, measure the baselines and load the checkpoint to go on from."""
    device = torch_device(config)
    if device.type == "cpu":
        torch.set_num_threads(torch_threads())
    dataset = build_dataset(config)
    reader = tuned_reader(config, dataset, console.print)
    loader = build_loader(config, dataset, config.data.batch_size, normalized=False, **reader)
    settings = loop_settings(config, len(loader), device)
    model = build_model(config, device)
    masks = build_masks(config, model, device)
    if config.training.compile:
        model.compile(dynamic=False)  # in place: the parameters keep their names
    optimizer = build_optimizer(model, config.training.weight_decay, config.training.betas)
    folder = open_run_folder(config, console.print)
    loader.quarantine = Quarantine(dataset.index, folder / "quarantine.jsonl", config.data.max_bad_share)
    probe = Probe(config, folder, model, console.print)
    probe.measure_baselines()
    session = Session(
        config, console, folder, dataset, loader, model, masks, optimizer, settings, probe, RunState()
    )  # fmt: skip
    if (start := start_from(session)) is not None:
        session.restore(start)
        if session.state.step >= settings.total_steps:
            session.say("this run is complete: a higher training.epochs goes on, checkpoint.resume=none starts over")
    return session


def start_from(session: Session) -> Path | None:
    resume = session.config.checkpoint.resume
    if resume == "auto":
        return newest_checkpoint(session.checkpoints, session.say)
    return None if resume == "none" else Path(resume)


def train(session: Session, stop: StopSignal) -> int:
    """Train to the end: 0, STOPPED or DIVERGED. Numbers gone wrong send the run back to its last checkpoint, once each."""
    gone_back_to: Path | None = None
    while True:
        train_once(session, stop)
        state = session.state
        if not gone_wrong(state, session.settings):
            break
        newest = newest_checkpoint(session.checkpoints, session.say)
        bad = f"step {state.step}: {state.skipped_in_a_row} steps in a row without a finite loss and gradient"
        if newest is None or newest == gone_back_to:
            again = " again" if newest else ""
            session.say(
                f"{bad}{again}; stopped. No weight was touched by them. Lower training.lr or training.grad_clip, lengthen "
                "training.warmup_epochs, or set training.use_amp=false; the same command then goes on"
            )
            return DIVERGED
        session.say(f"{bad}; going back to the last checkpoint")
        gone_back_to = newest
        session.restore(newest)
    if state.step < session.settings.total_steps:
        session.save()
        session.say(f"stopped at step {state.step}; the same command goes on from there")
        return STOPPED
    return 0


def train_once(session: Session, stop: StopSignal) -> None:
    """Until the end, a stop, or numbers gone wrong."""
    config, state, total = session.config, session.state, session.settings.total_steps
    with (
        MetricsLog(session.folder, config.logging.tensorboard, state.step) as metrics,
        Display(session.console, config.logging.run_name, state.step, total, len(session.loader)) as display,
    ):
        train_steps(
            session.model,
            session.masks,
            session.optimizer,
            session.loader,
            state,
            session.settings,
            log=lambda values: metrics.write(state.step, values),
            tell=session.say,
            show=lambda: display.update(state),
            probe=lambda: metrics.write(state.step, session.probe.online()),
            save=session.save,
            stop=lambda: stop.asked,
        )


def finish(session: Session) -> int:
    """Evaluate and draw."""
    session.console.print("evaluating and drawing ...", style="dim")
    summary = write_summary(session.folder, session.config, session.state, session.probe, session.model.encoder.width)
    figures = draw_figures(session.folder, session.config, session.dataset, session.model, session.masks)
    session.console.print(summary_table(summary))
    session.say("pictures: " + ", ".join(os.path.relpath(figure) for figure in figures))
    return 0
