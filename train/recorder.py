"""What rank 0 records of a run: metrics, progress, heartbeat, measurements, checkpoints and the report."""

import json
import logging
import os
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import cast

from rich.console import Console

from model.hjepa import HJEPA
from pipeline.files import write_atomic
from pipeline.shards.object_store import StoreError
from train.build import describe_epoch
from train.checkpoint import CheckpointWriter, checkpoint_path
from train.evaluation.online import OnlineEvaluation
from train.output.advice import advice
from train.output.display import Display, summary_table
from train.output.folder import open_run_folder
from train.output.log import MetricsLog, open_wandb
from train.output.page import write_page
from train.output.pictures import NEIGHBOURS, QUERIES, draw_run, read_picture
from train.output.report import write_report, write_summary
from train.state import RunState
from train.trainer import DIVERGED, STOPPED, Recorder, Trainer

log = logging.getLogger(__name__)

NOT_WRITTEN = 4  # the disk refused the last checkpoint or the summary
STATUSES = {0: "complete", STOPPED: "stopped", DIVERGED: "diverged"}
HEARTBEAT_S = 5.0


def open_recorder(trainer: Trainer, console: Console) -> Recorder:
    """Open the run's folder, resume its checkpoint and return what records it from there."""
    probe = open_run(trainer) if trainer.ranks.is_first else None
    trainer.ranks.barrier()  # until rank 0 has made the folder
    trainer.resume()
    return Recorder() if probe is None else RunRecorder(trainer, probe, console)


def open_run(trainer: Trainer) -> OnlineEvaluation:
    """Check the validation split, make the run's folder, and measure the baselines while the model is untrained."""
    config = trainer.config
    probe = OnlineEvaluation(config, trainer.folder, cast(HJEPA, trainer.model))
    open_run_folder(config, trainer.dataset.index.digest)
    log.info(describe_epoch(config, trainer.loader))
    probe.measure_baselines()
    return probe


class RunRecorder(Recorder):
    """Writes the run of `trainer` into its folder, and shows it on `console`."""

    def __init__(self, trainer: Trainer, probe: OnlineEvaluation, console: Console) -> None:
        config, total_steps = trainer.config, trainer.schedule.total_steps
        self._trainer, self._probe, self._console = trainer, probe, console
        checkpoints, keep = trainer.folder / "checkpoints", config.checkpoint
        self._writer = CheckpointWriter(checkpoints, keep.keep_last_n, keep.keep_best_n)
        self._heartbeat = Heartbeat(trainer.folder, total_steps)
        self._display = Display(
            console, config.logging.run_name, trainer.state.step, total_steps, trainer.steps_per_epoch
        )
        wandb = config.logging.wandb
        self._wandb = open_wandb(wandb.project, trainer.folder, config.resolved) if wandb.enabled else None
        self._log_stack = ExitStack()
        self._metrics = self._open_metrics()

    def _open_metrics(self) -> MetricsLog:
        tensorboard, step = self._trainer.config.logging.tensorboard, self._trainer.state.step
        return self._log_stack.enter_context(MetricsLog(self._trainer.folder, tensorboard, step, self._wandb))

    def display(self) -> AbstractContextManager[object]:
        return self._display

    def log(self, line: dict[str, float]) -> None:
        state = self._trainer.state
        if line:
            self._metrics.write(state.step, line)
        self._display.update(state)
        self._heartbeat.beat(state)

    def evaluate(self) -> None:
        """Log k-NN and RankMe, and draw. A failing object store is left to the trainer: it saves and stops."""
        state = self._trainer.state
        try:
            values = self._probe.online()
            state.knn, state.knn_step = values.get("knn"), state.step
            self._metrics.write(state.step, values)
            self._draw()
        except StoreError as error:
            self._trainer.store_error = error

    def _draw(self) -> list[Path]:
        """Draw the pictures of the run as it is now, and put them into TensorBoard."""
        trainer = self._trainer
        if not trainer.config.logging.pictures:
            return []
        neighbours, model = self._probe.neighbours(QUERIES, NEIGHBOURS), cast(HJEPA, trainer.model)
        paths = draw_run(trainer.folder, trainer.config, trainer.dataset, model, trainer.masks, neighbours)
        for path in paths:
            self._metrics.picture(trainer.state.step, path.stem, read_picture(path))
        return paths

    def save(self) -> None:
        if not self._trainer.diverged:
            self._writer.write(self._trainer.snapshot(self._score()))

    def _score(self) -> float | None:
        """Return the k-NN measured at this step or, in a run that measures none, the negative loss."""
        state = self._trainer.state
        if self._trainer.config.evaluation.eval_frequency:
            return state.knn if state.knn_step == state.step else None
        return None if state.loss_last is None else -state.loss_last

    def wait(self) -> None:
        self._writer.wait()

    def rewind(self) -> None:
        self._log_stack.close()
        self._metrics = self._open_metrics()

    def report(self) -> int:
        """Measure the trained encoder, draw, and write summary.json, report.md and report.html: 0 or NOT_WRITTEN."""
        trainer, folder, config = self._trainer, self._trainer.folder, self._trainer.config
        self._console.print("evaluating and drawing ...", style="dim")
        self._heartbeat.write("evaluating", trainer.state)
        trainer.loader.close()
        try:
            summary = write_summary(folder, config, trainer.state, self._probe, trainer.model.encoder.width)
            pictures = self._draw()
            hints = advice(config, summary)
            write_report(folder, summary, hints, pictures)
            page = write_page(folder, hints)
        except OSError as error:
            log.error(f"{folder}: the summary could not be written ({error}); the same command tries again")
            return NOT_WRITTEN
        self._console.print(summary_table(summary))
        for line in (*hints, f"report: {page}, pictures: {folder / 'figures'}"):
            log.info(line)
        if checkpoint_path(folder / "checkpoints", trainer.state.step).exists():
            return 0
        log.error(
            f"the weights of step {trainer.state.step} are NOT saved: free some space; the same command continues from the last "
            "checkpoint"
        )
        return NOT_WRITTEN

    def close(self, code: int) -> None:
        self._log_stack.close()
        self._heartbeat.write(STATUSES.get(code, "failed"), self._trainer.state)
        if self._wandb is not None:
            self._wandb.finish(exit_code=code)


class Heartbeat:
    """`heartbeat.json`: `{status, step, total_steps, time, pid}`, replaced atomically; `time` is seconds since 1970.

    Statuses: training, evaluating and, at the end, complete, stopped (run it again), diverged or failed.
    """

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._path, self._total_steps, self._written_at = folder / "heartbeat.json", total_steps, 0.0

    def beat(self, state: RunState) -> None:
        """Write `training`, at most once in a few seconds."""
        if time.monotonic() - self._written_at >= HEARTBEAT_S:
            self.write("training", state)

    def write(self, status: str, state: RunState) -> None:
        self._written_at = time.monotonic()
        now = {"time": round(time.time(), 1), "pid": os.getpid()}
        content = {"status": status, "step": state.step, "total_steps": self._total_steps, **now}
        with suppress(OSError):  # a full disk is reported where it costs a checkpoint
            write_atomic(self._path, json.dumps(content) + "\n", durable=False)
