"""The parts of a run, built from its settings and brought to where its last checkpoint left them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.dataset import MultiCropDataset
from pipeline.loader import MultiCropLoader
from pipeline.quarantine import Quarantine
from train.build import (
    build_dataset,
    build_masks,
    build_model,
    build_training_loader,
    describe_epoch,
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
from train.config.schema import Config
from train.distributed import Ranks, replicated
from train.evaluation.online import OnlineEvaluation
from train.heartbeat import Heartbeat
from train.optim import build_optimizer
from train.output.folder import open_run_folder, run_folder
from train.output.log import open_wandb
from train.state import RunState
from train.step import LoopSettings


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
    probe: OnlineEvaluation | None
    heartbeat: Heartbeat | None
    wandb: Any
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

    def tell_status(self, status: str) -> None:
        """In heartbeat.json, on the first rank."""
        if self.heartbeat is not None:
            self.heartbeat.write(status, self.state)

    def restore(self, path: Path) -> None:
        """Raises ValueError when the checkpoint is damaged or of another architecture."""
        saved = load_checkpoint(path, self.model, self.optimizer)
        self.state = RunState(**saved["run"])
        self.state.skipped_in_a_row = 0  # or a run that ended for it could never be tried again
        self.loader.load_state_dict(saved["loader"])
        self.say(f"going on from {path} (step {self.state.step} of {self.settings.total_steps})")


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
    folder, probe, heartbeat, wandb = run_folder(config), None, None, None
    if ranks.is_first:
        open_run_folder(config, console.print)
        console.print(describe_epoch(config, loader), highlight=False)
        probe = OnlineEvaluation(config, folder, model)
        probe.measure_baselines()
        wandb = open_wandb(
            config.logging.wandb.enabled, config.logging.wandb.project, folder.name, folder, config.resolved
        )
        heartbeat = Heartbeat(folder, settings.total_steps)
    keep = (config.checkpoint.keep_last_n, config.checkpoint.keep_best_n)
    writer = CheckpointWriter(folder / "checkpoints", *keep, console.print)
    session = Session(
        config, console, ranks, folder, dataset, loader, model, replicated(model, ranks), masks, optimizer, settings, probe,
        heartbeat, wandb, writer, RunState(),
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
