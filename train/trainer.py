"""One training run: build it, restore its checkpoint, train, save, evaluate. `train/run.py` is the command in front of it."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.dataset import resolve_device
from train.build import (
    ALONE,
    build_dataset,
    build_masks,
    build_model,
    build_schedule,
    build_training_loader,
    describe_epoch,
    with_crop_device,
)
from train.checkpoint import (
    CheckpointWriter,
    checkpoint_path,
    checkpoint_step,
    load_checkpoint,
    newest_checkpoint,
    take_snapshot,
)
from train.config.schema import Config
from train.distributed import Ranks, Watchdog, replicated
from train.evaluation.online import OnlineEvaluation
from train.monitor import CollapseAlarm, Heartbeat, RunningMeans, Speed, StepGuard, StoreGuard, memory_metrics
from train.optim import build_optimizer
from train.output.advice import advice, limiting_key
from train.output.display import Display, summary_table
from train.output.folder import StopSignal, open_run_folder, run_folder
from train.output.log import MetricsLog, open_wandb
from train.output.page import write_page
from train.output.pictures import NEIGHBOURS, QUERIES, draw_run, read_picture
from train.output.report import write_report, write_summary
from train.state import RunState
from train.step import StepResult, Updater, batches

log = logging.getLogger(__name__)

STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command continues from it
NOT_WRITTEN = 4  # the disk refused the last checkpoint or the summary
STORE_FAILED = 2  # the object store did not give the next shards; the last checkpoint is of the last step
DIVERGED = 3  # too many steps without finite numbers; the last checkpoint is sound
STATUSES = {0: "complete", STOPPED: "stopped", DIVERGED: "diverged"}


class Trainer:
    """The parts of a run. `Trainer(config)` builds them and `step` trains them, without writing anything.

    A whole run goes `open`, `fit`, `evaluate`, `close`; `evaluate` is for rank 0 alone.
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        config = with_crop_device(config)
        self.config, self.ranks, self.device = config, ranks, ranks.device(resolve_device(config.device))
        training = config.training
        self.dataset = build_dataset(config)
        self.model = build_model(config, self.device)
        self.masks = build_masks(config, self.model, self.device)
        quarantine = run_folder(config) / "quarantine.jsonl"
        self.loader = build_training_loader(config, self.dataset, ranks, quarantine=quarantine)
        self.schedule = build_schedule(config, len(self.loader))
        self.steps_per_epoch = len(self.loader) // training.accumulation_steps
        if training.compile:
            self.model.compile(dynamic=False)  # in place: the parameters keep their names
        self.optimizer = build_optimizer(self.model, training.weight_decay, training.betas, training.optimizer)
        replica = replicated(self.model, ranks)
        self._updater = Updater(config, self.model, replica, self.masks, self.optimizer, self.schedule, ranks)
        self.folder = run_folder(config)
        self.checkpoints = self.folder / "checkpoints"
        self._writer = CheckpointWriter(self.checkpoints, config.checkpoint.keep_last_n, config.checkpoint.keep_best_n)
        self._alarm = CollapseAlarm(self.model.encoder.width)
        self._console = Console(quiet=True)
        self._probe: OnlineEvaluation | None = None
        self._heartbeat: Heartbeat | None = None
        self._store = StoreGuard()
        self._wandb: Any = None
        self._continue_from(RunState())

    def _continue_from(self, state: RunState) -> None:
        """Take the next step from `state`, with the batches from where the loader stands."""
        self.state = state
        self.loader.batches_left = (self.schedule.total_steps - state.step) * self.config.training.accumulation_steps
        self._guard, self._means, self._speed = StepGuard(self.device, state), RunningMeans(), Speed(state)
        self._stream = batches(self.loader, self.config.training.accumulation_steps)

    def open(self, console: Console) -> None:
        """Make the run folder, measure the baselines and restore the checkpoint that `checkpoint.resume` names."""
        config, logging_ = self.config, self.config.logging
        self._console = console
        if self.ranks.is_first:
            self._probe = OnlineEvaluation(config, self.folder, self.model)
            open_run_folder(config, self.dataset.index.digest)
            log.info(describe_epoch(config, self.loader))
            self._probe.measure_baselines()
            if logging_.wandb.enabled:
                self._wandb = open_wandb(logging_.wandb.project, self.folder, config.resolved)
            self._heartbeat = Heartbeat(self.folder, self.schedule.total_steps)
        self.ranks.any(False)  # wait until rank 0 has made the folder
        resume = config.checkpoint.resume
        checkpoint = self._newest_checkpoint() if resume == "auto" else None if resume == "none" else Path(resume)
        if checkpoint is not None:
            self.restore(checkpoint)
            if self.complete:
                limit = limiting_key(config, self.schedule.total_steps)
                log.info(f"this run is complete: to continue, raise {limit}; checkpoint.resume=none starts over")

    def restore(self, path: Path) -> None:
        """Raises ValueError when the checkpoint is damaged or of another architecture."""
        saved = load_checkpoint(path, self.model, self.optimizer)
        self.loader.load_state_dict(saved["loader"])
        # A count of 0, or a run that ended for its skipped steps could never be tried again.
        self._continue_from(RunState(**{**saved["run"], "skipped_in_a_row": 0}))
        log.info(f"continuing from {path} (step {self.state.step} of {self.schedule.total_steps})")

    def _newest_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint, which rank 0 chooses for all."""
        self._writer.wait()
        path = newest_checkpoint(self.checkpoints) if self.ranks.is_first else None
        step = self.ranks.from_first(-1 if path is None else checkpoint_step(path))
        return None if step < 0 else checkpoint_path(self.checkpoints, step)

    @property
    def complete(self) -> bool:
        return self.state.step >= self.schedule.total_steps

    @property
    def diverged(self) -> bool:
        """Whether too many steps in a row had a loss or gradient that is not finite, as of the last logging step."""
        return self.state.skipped_in_a_row >= self.config.training.max_skipped_steps

    def fit(self, stop: StopSignal) -> int:
        """Train to the end: 0, STOPPED, STORE_FAILED or DIVERGED. A run that diverges goes back to its last checkpoint, once."""
        rolled_back_to: Path | None = None
        while True:
            self._train(stop)
            self._guard.read(self.state)
            state = self.state
            if not self.diverged:
                break
            checkpoint = self._newest_checkpoint()
            bad = f"step {state.step}: {state.skipped_in_a_row} steps in a row without a finite loss and gradient"
            if checkpoint is None or checkpoint == rolled_back_to:
                again = " again" if checkpoint else ""
                log.error(
                    f"{bad}{again}; stopped. These steps did not change any weights. Lower training.lr or training.grad_clip, "
                    "lengthen training.warmup_epochs, or set training.use_amp=false; the same command then continues"
                )
                return DIVERGED
            log.warning(f"{bad}; going back to the last checkpoint")
            rolled_back_to = checkpoint
            self.restore(checkpoint)
        if not self.complete:
            self.save()
        self._writer.wait()
        if self.complete:
            return 0
        self.ranks.any(False)  # torchrun gives the others half a minute once one rank has left
        if self._store.error is not None:
            log.error(f"{self._store.error}; saved at step {state.step}, from which the same command continues")
            return STORE_FAILED
        log.info(f"stopped at step {state.step}; the same command continues from there")
        return STOPPED

    def _train(self, stop: StopSignal) -> None:
        """The training loop: until the end, a request to stop, or divergence."""
        config, name = self.config, self.config.logging.run_name
        progress = (self.state.step, self.schedule.total_steps, self.steps_per_epoch)
        with (
            self._open_metrics() as metrics,
            Display(self._console, name, *progress) as display,
            Watchdog(self.ranks, config.training.timeout_s) as watchdog,
        ):
            while not self.complete and not self.diverged and not self.ranks.any(self._must_stop(stop)):
                values = self.step()
                if values and metrics is not None:
                    metrics.write(self.state.step, values)
                display.update(self.state)
                if self._heartbeat is not None:
                    self._heartbeat.beat(self.state)
                probed = self._due(config.evaluation.eval_frequency * self.steps_per_epoch) and not self.complete
                if probed:
                    watchdog.rest()
                    self._evaluate_online(metrics)
                    watchdog.beat()
                due = self._due(config.checkpoint.save_frequency) or (probed and config.checkpoint.keep_best_n > 0)
                if due or self.complete:
                    self.save()
                watchdog.beat()

    def _must_stop(self, stop: StopSignal) -> bool:
        parts = self.config.training.accumulation_steps
        return self._store.failed(self.loader, parts, self.state, lambda: stop.asked) or stop.asked

    def step(self) -> dict[str, float]:
        """Take one optimiser step. At a logging step, what metrics.jsonl records of it; else nothing."""
        state, started = self.state, time.perf_counter()
        result = self._updater.take(self._stream, state, self._guard)
        self._means.add(result.losses, result.grad_norm, result.skip)
        state.step += 1
        due = self._due(self.config.logging.log_frequency) or self.complete
        means = {}
        if due or state.step == 1:
            means = self._means.read(self.ranks)
            state.loss_last = means.get("loss", state.loss_last)
            state.loss_first = state.loss_last if state.loss_first is None else state.loss_first
            self._guard.read(state)
        state.train_s += time.perf_counter() - started
        return self._metrics(result, means) if due else {}

    def _metrics(self, result: StepResult, means: dict[str, float]) -> dict[str, float]:
        """One line of metrics.jsonl; the means start anew."""
        state, (signals, rows) = self.state, self._means.collapse_signals()
        state.bad_samples = len(self.loader.quarantine)
        if signals:
            self._alarm.check(state, signals, rows)
        self._means = RunningMeans()
        return {
            **means,
            **signals,
            "lr": result.lr,
            "ema_momentum": result.momentum,
            **self._speed.since_last(state),
            "skipped_steps": state.skipped_steps,
            "collapse_alarm": float(state.collapsed),
            "bad_samples": state.bad_samples,
            **memory_metrics(self.device),
            "epoch": self.loader.state_dict()["epoch"],
        }

    def _due(self, frequency: int) -> bool:
        """Whether it is time for what happens every `frequency` steps; 0: never."""
        return frequency > 0 and self.state.step % frequency == 0

    def save(self) -> None:
        """Write a checkpoint, unless the run has diverged: on rank 0, in the background while training continues."""
        self._guard.read(self.state)
        if self.ranks.is_first and not self.diverged:
            run, loader = self.state.as_dict(), self.loader.state_dict()
            saved = {"step": self.state.step, "run": run, "loader": loader, "score": self._score()}
            self._writer.write(take_snapshot(self.model, self.optimizer, saved))

    def _score(self) -> float | None:
        """Ranks checkpoints: the k-NN measured at this step or, in a run that measures none, the negative loss."""
        state = self.state
        if self.config.evaluation.eval_frequency:
            return state.knn if state.knn_step == state.step else None
        return None if state.loss_last is None else -state.loss_last

    def _evaluate_online(self, metrics: MetricsLog | None) -> None:
        """Measure k-NN and draw, on rank 0, while the others wait."""
        if self._probe is not None:
            with self._store.noting():
                values = self._probe.online()
                self.state.knn, self.state.knn_step = values.get("knn"), self.state.step
                if metrics is not None:
                    metrics.write(self.state.step, values)
                self._draw(self._probe, metrics)
        self.ranks.any(False)

    def _open_metrics(self) -> AbstractContextManager[MetricsLog | None]:
        if not self.ranks.is_first:
            return nullcontext()
        return MetricsLog(self.folder, self.config.logging.tensorboard, self.state.step, self._wandb)

    def _draw(self, probe: OnlineEvaluation, metrics: MetricsLog | None) -> list[Path]:
        """Draw the pictures of the run as it is now, and put them into its log."""
        if not self.config.logging.pictures:
            return []
        neighbours = probe.neighbours(QUERIES, NEIGHBOURS)
        paths = draw_run(self.folder, self.config, self.dataset, self.model, self.masks, neighbours)
        if metrics is not None:
            for path in paths:
                metrics.picture(self.state.step, path.stem, read_picture(path))
        return paths

    def evaluate(self) -> int:
        """Measure the trained encoder, draw, and write summary.json, report.md and report.html: 0 or NOT_WRITTEN."""
        folder, state, probe = self.folder, self.state, self._probe
        assert probe is not None, "evaluate() is for rank 0, after open()"
        self._console.print("evaluating and drawing ...", style="dim")
        self._set_status("evaluating")
        self.loader.close()
        try:
            with self._open_metrics() as metrics:
                summary = write_summary(folder, self.config, state, probe, self.model.encoder.width)
                pictures = self._draw(probe, metrics)
            hints = advice(self.config, summary)
            write_report(folder, summary, hints, pictures)
            page = write_page(folder, hints)
        except OSError as error:
            log.error(f"{folder}: the summary could not be written ({error}); the same command tries again")
            return NOT_WRITTEN
        self._console.print(summary_table(summary))
        for line in (*hints, f"report: {page}, pictures: {folder / 'figures'}"):
            log.info(line)
        if checkpoint_path(self.checkpoints, state.step).exists():
            return 0
        log.error(
            f"the weights of step {state.step} are NOT saved: free some space; the same command continues from the last "
            "checkpoint"
        )
        return NOT_WRITTEN

    def close(self, code: int) -> None:
        """Note how the run ended, by its exit code."""
        self._set_status(STATUSES.get(code, "failed"))
        if self._wandb is not None:
            self._wandb.finish(exit_code=code)

    def _set_status(self, status: str) -> None:
        """In heartbeat.json, on rank 0."""
        if self._heartbeat is not None:
            self._heartbeat.write(status, self.state)
