"""One run, from its settings to its pictures. `train/run.py` is the command in front of it."""

import os
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset, resolve_device
from pipeline.loader import MultiCropLoader
from pipeline.quarantine import Quarantine
from train.build import (
    build_dataset,
    build_masks,
    build_model,
    build_training_loader,
    loop_settings,
    torch_threads,
    tuned_reader,
)
from train.checkpoint import (
    checkpoint_path,
    checkpoint_step,
    load_checkpoint,
    newest_checkpoint,
    take_snapshot,
)
from train.checkpoint_writer import CheckpointWriter
from train.config import Config
from train.display import Display, summary_table
from train.distributed import Ranks, Watchdog, joined, ranks_from_environment, replicated
from train.loop import LoopSettings, gone_wrong, train_steps
from train.memory import is_out_of_memory, out_of_memory_advice
from train.metrics import MetricsLog
from train.optim import build_optimizer
from train.probe import Probe
from train.report import draw_figures, write_summary
from train.run_folder import StopSignal, open_run_folder, run_folder
from train.state import RunState

LOST = 1  # another rank died or hangs
STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on from it
NOT_WRITTEN = 4  # the disk refused the last checkpoint or the summary
DIVERGED = 3  # too many steps without finite numbers; the last checkpoint is sound


@dataclass
class Session:
    """The parts of a run; `state` is replaced when a checkpoint is loaded."""

    config: Config
    console: Console
    ranks: Ranks
    folder: Path
    dataset: MultiCropDataset
    loader: MultiCropLoader
    model: HJEPA
    replica: torch.nn.Module
    masks: MultiCropMaskGenerator
    optimizer: torch.optim.Optimizer
    settings: LoopSettings
    probe: Probe | None
    writer: CheckpointWriter
    state: RunState

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def save(self) -> None:
        """On the first rank alone; the files are written while training goes on."""
        if self.ranks.is_first:
            state = self.state
            saved = {
                "step": state.step,
                "run": state.as_dict(),
                "loader": self.loader.state_dict(),
                "score": self.score(),
            }
            self.writer.write(take_snapshot(self.model, self.optimizer, saved))

    def score(self) -> float | None:
        """By which the best checkpoints are kept: the k-NN measured at this step or, in a run that measures none, the loss."""
        if self.settings.probe_frequency:
            return self.state.knn if self.state.knn_step == self.state.step else None
        return None if self.state.loss_last is None else -self.state.loss_last

    def restore(self, path: Path) -> None:
        """Raises ValueError when the checkpoint is damaged or of another architecture."""
        saved = load_checkpoint(path, self.model, self.optimizer)
        self.state = RunState(**saved["run"])
        self.state.skipped_in_a_row = 0  # or a run that ended for it could never be tried again
        self.loader.load_state_dict(saved["loader"])
        self.say(f"going on from {path} (step {self.state.step} of {self.settings.total_steps})")


def run(config: Config, console: Console) -> int:
    """Train, evaluate and draw; returns the exit code. On rank 0 alone there is something to see."""
    ranks, kind = ranks_from_environment(), resolve_device(config.device)
    with joined(ranks, kind):
        session = prepare(config, console, ranks, ranks.device(kind))
        with StopSignal(console.print) as stop:
            try:
                code = train(session, stop)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise ValueError(
                        out_of_memory_advice(config, ranks.device(kind), session.settings.use_amp)
                    ) from None
                if ranks.world_size == 1:
                    raise
                # Most likely another rank has died, and its own message says why; where this one stood may help as well.
                traceback.print_exc()
                print(f"rank {ranks.rank}: lost the others at step {session.state.step}", file=sys.stderr)
                return LOST
    return code if code or not ranks.is_first else finish(session)


def prepare(config: Config, console: Console, ranks: Ranks, device: torch.device) -> Session:
    """Build every part, measure the baselines and load the checkpoint to go on from."""
    if device.type == "cpu":
        torch.set_num_threads(torch_threads())
    dataset = build_dataset(config)
    reader = tuned_reader(config, dataset, console.print, ranks)
    loader = build_training_loader(config, dataset, ranks, **reader)
    settings = loop_settings(config, len(loader), device)
    model = build_model(config, device)
    masks = build_masks(config, model, device)
    if config.training.compile:
        model.compile(dynamic=False)  # in place: the parameters keep their names
    optimizer = build_optimizer(model, config.training.weight_decay, config.training.betas)
    folder, probe = run_folder(config), None
    if ranks.is_first:
        open_run_folder(config, console.print)
        probe = Probe(config, folder, model, console.print)
        probe.measure_baselines()
    keep = (config.checkpoint.keep_last_n, config.checkpoint.keep_best_n)
    writer = CheckpointWriter(folder / "checkpoints", *keep, console.print)
    session = Session(
        config, console, ranks, folder, dataset, loader, model, replicated(model, ranks), masks, optimizer, settings, probe,
        writer, RunState(),
    )  # fmt: skip
    start = start_from(session)
    # Now that rank 0 has made the folder.
    loader.quarantine = Quarantine(dataset.index, folder / "quarantine.jsonl", config.data.max_bad_share)
    if start is not None:
        session.restore(start)
        if session.state.step >= settings.total_steps:
            session.say("this run is complete: a higher training.epochs goes on, checkpoint.resume=none starts over")
    return session


def start_from(session: Session) -> Path | None:
    resume = session.config.checkpoint.resume
    session.ranks.any(False)  # until rank 0 has made the run's folder
    if resume == "auto":
        return newest(session)
    return None if resume == "none" else Path(resume)


def newest(session: Session) -> Path | None:
    """The newest sound checkpoint, which rank 0 chooses."""
    session.writer.wait()
    path = newest_checkpoint(session.checkpoints, session.say) if session.ranks.is_first else None
    step = session.ranks.from_first(-1 if path is None else checkpoint_step(path))
    return None if step < 0 else checkpoint_path(session.checkpoints, step)


def train(session: Session, stop: StopSignal) -> int:
    """Train to the end: 0, STOPPED or DIVERGED. Numbers gone wrong send the run back to its last checkpoint, once each."""
    gone_back_to: Path | None = None
    while True:
        train_once(session, stop)
        state = session.state
        if not gone_wrong(state, session.settings):
            break
        last_sound = newest(session)
        bad = f"step {state.step}: {state.skipped_in_a_row} steps in a row without a finite loss and gradient"
        if last_sound is None or last_sound == gone_back_to:
            again = " again" if last_sound else ""
            session.say(
                f"{bad}{again}; stopped. No weight was touched by them. Lower training.lr or training.grad_clip, lengthen "
                "training.warmup_epochs, or set training.use_amp=false; the same command then goes on"
            )
            return DIVERGED
        session.say(f"{bad}; going back to the last checkpoint")
        gone_back_to = last_sound
        session.restore(last_sound)
    if state.step < session.settings.total_steps:
        session.save()
        session.writer.wait()
        session.ranks.any(False)  # torchrun gives the others half a minute once one rank has left
        session.say(f"stopped at step {state.step}; the same command goes on from there")
        return STOPPED
    session.writer.wait()
    return 0


def train_once(session: Session, stop: StopSignal) -> None:
    """Until the end, a stop, or numbers gone wrong."""
    config, state, settings, ranks = session.config, session.state, session.settings, session.ranks
    first = ranks.is_first
    per_epoch = len(session.loader) // settings.accumulation_steps
    with (
        MetricsLog(session.folder, config.logging.tensorboard, state.step, session.say)
        if first
        else nullcontext() as metrics,
        Display(session.console, config.logging.run_name, state.step, settings.total_steps, per_epoch) as display,
        Watchdog(ranks, config.training.timeout_s) as watchdog,
    ):

        def log(values: dict[str, float]) -> None:
            if metrics is not None:
                metrics.write(state.step, values)

        def probe() -> None:
            watchdog.rest()
            if session.probe is not None:
                figures = session.probe.online()
                state.knn, state.knn_step = figures.get("knn"), state.step
                log(figures)
            ranks.any(False)
            watchdog.beat()

        def stop_now() -> bool:
            watchdog.beat()
            return ranks.any(stop.asked)

        train_steps(
            session.model,
            session.replica,
            session.masks,
            session.optimizer,
            session.loader,
            state,
            settings,
            ranks,
            log=log,
            tell=session.say,
            show=lambda: display.update(state),
            probe=probe,
            save=session.save,
            stop=stop_now,
        )


def finish(session: Session) -> int:
    """Evaluate and draw, on rank 0."""
    session.console.print("evaluating and drawing ...", style="dim")
    assert session.probe is not None
    folder, state = session.folder, session.state
    try:
        summary = write_summary(folder, session.config, state, session.probe, session.model.encoder.width)
        figures = draw_figures(folder, session.config, session.dataset, session.model, session.masks)
    except OSError as error:
        session.say(f"{folder}: the summary could not be written ({error}); the same command tries again")
        return NOT_WRITTEN
    session.console.print(summary_table(summary))
    session.say("pictures: " + ", ".join(os.path.relpath(figure) for figure in figures))
    return 0 if checkpoint_path(session.checkpoints, state.step).exists() else NOT_WRITTEN
