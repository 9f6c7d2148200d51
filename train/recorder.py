"""Records a run: metrics, progress, heartbeat, measurements, checkpoints and the report; or only describes it, with --dry-run."""

import json
import logging
import os
import time
from contextlib import ExitStack, suppress
from typing import Self, cast

import torch
from rich.console import Console

from model.hjepa import HJEPA
from pipeline.dataset import own_cores
from pipeline.files import write_atomic
from pipeline.memory import memory_limit
from pipeline.shards.index import UNLABELLED
from pipeline.text import plural
from train.checkpoint import MIXED, CheckpointWriter, abandon_others, checkpoint_step, list_checkpoints, resumed_from
from train.command import INTERRUPTED
from train.distributed import LOST
from train.evaluation.online import OnlineEvaluation
from train.monitor import memory_metrics
from train.output.display import Display
from train.output.folder import check_run_folder, open_run_folder
from train.output.log import MetricsLog, open_wandb, wandb_may_fail
from train.output.pictures import NEIGHBOURS, QUERIES, draw_run
from train.output.report import advice, current_summary, forgetting, stop_setting, summary_table, write_page, write_summary
from train.trainer import DIVERGED, NOT_WRITTEN, STOPPED, Trainer

log = logging.getLogger(__name__)

STATUSES = {0: "complete", STOPPED: "stopped", DIVERGED: "diverged", INTERRUPTED: "interrupted"}  # other exit codes: failed
SHOWN = {"knn": "k-NN", "linear": "linear probe", "placement": "placement"}  # on the screen at each evaluation
HEARTBEAT_S = 5.0
GIB = 2**30


def open_recorder(trainer: Trainer, console: Console, opened: ExitStack) -> "Recorder | None":
    """Open the run's folder, restore the checkpoint that `checkpoint.resume` names, and return rank 0's Recorder.

    Until `opened` is closed, other processes are kept out of the folder.
    """
    config, ranks, folder = trainer.config, trainer.ranks, trainer.folder / "checkpoints"
    evaluation = OnlineEvaluation(config, trainer.folder, cast(HJEPA, trainer.model), trainer.start) if ranks.is_first else None
    if evaluation is not None:
        open_run_folder(config, trainer.dataset.index.digest, opened, trainer.start)
        log_description(trainer)
        evaluation.measure_baselines()  # now, while the model is untrained
    ranks.barrier()  # the folder exists
    checkpoint = resumed_from(config.checkpoint.resume, folder, ranks)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        if ranks.is_first:
            abandon_others(folder, checkpoint)
    elif ranks.is_first and list_checkpoints(folder):
        raise ValueError(
            f"{folder}: every checkpoint is damaged. Bring one back from a backup, or start over with checkpoint.resume=none, "
            "which moves them aside"
        )
    elif ranks.is_first and (trainer.folder / "metrics.jsonl").exists():
        log.warning(f"{trainer.folder}: an earlier start left no checkpoint, so this one begins at step 0 again")
    if trainer.complete:
        limit = stop_setting(config, trainer.schedule.total_steps)
        log.info(f"this run is complete: to continue, raise {limit}; checkpoint.resume=none starts over")
    return None if evaluation is None else Recorder(trainer, evaluation, console)


def log_description(trainer: Trainer) -> None:
    """Log one line about the data, one about the model and one about the schedule."""
    config, index, model = trainer.config, trainer.dataset.index, cast(HJEPA, trainer.model)
    labelled = int((index.samples["label"] != UNLABELLED).sum())
    log.info(f"data: {len(index):,} images ({labelled:,} labelled) in {len(index.shards)} shards of {index.folder}")
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        f"model: {config.model.encoder}, {encoder / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
        f"{model.grid}x{model.grid} tokens in a global crop, {len(model.levels)} levels"
    )
    images, schedule = trainer.loader.global_batch * config.training.accumulation_steps, trainer.schedule
    left_out = f"; each epoch leaves out {len(index) % images} images, which fill no step" if len(index) % images else ""
    log.info(
        f"run: {schedule.total_steps:,} steps of {images:,} images on {trainer.ranks.world_size} rank(s), "
        f"{trainer.steps_per_epoch:,} steps an epoch, {schedule.warmup_steps:,} of warm-up{left_out}"
    )


def dry_run(trainer: Trainer) -> None:
    """Take one step, log what it used and write nothing. Raises ValueError or FileNotFoundError as the run would."""
    config, device = trainer.config, trainer.device
    log_description(trainer)
    before, started = memory_metrics(device)["peak_memory_bytes"] / GIB, time.perf_counter()
    trainer.train_step()  # also waits for the device: it reads the first loss
    seconds, (peak, *in_use) = time.perf_counter() - started, (value / GIB for value in memory_metrics(device).values())
    used = (
        f"raised the memory of this process from {before:.2f} to {peak:.2f} GiB of the {memory_limit() / GIB:.1f} GiB there are"
    )
    if in_use:
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        used = f"took {peak:.2f} GiB in torch; {in_use[0]:.2f} of {total:.1f} GiB of {device} are in use"
    crops = f"{config.data.batch_size} images with {sum(config.data.crop_counts)} crops"
    log.info(f"step: {crops} on each rank took {seconds:.1f} s, including the start of the loader, and {used}")
    OnlineEvaluation(config, trainer.folder, cast(HJEPA, trainer.model))  # reports problems of the validation split
    check_run_folder(config, trainer.dataset.index.digest)
    resume, checkpoints = config.checkpoint.resume, list_checkpoints(trainer.folder / "checkpoints")
    if resume == "auto":
        resume = checkpoints[-1].name if checkpoints else "none"
    log.info(f"folder: {trainer.folder}; would {'start at step 0' if resume == 'none' else f'continue from {resume}'}")


def device_name(trainer: Trainer) -> str:
    """Return what the run computes on, such as `8 x NVIDIA H200` or `CPU, 2 cores`."""
    count = trainer.ranks.world_size
    if trainer.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(trainer.device)}"
    return f"CPU, {plural(own_cores() * count, 'core')}"


class Recorder:
    """Writes the run of `trainer` into its folder, and shows it on `console`; for rank 0.

    `heartbeat.json` holds `{status, step, total_steps, time, pid}`, with the time in seconds since 1970. Its status is training,
    evaluating or, at the end, complete, stopped (run it again), diverged, interrupted or failed. As a context, it notes the end
    of a run that an exception ends.
    """

    def __init__(self, trainer: Trainer, evaluation: OnlineEvaluation, console: Console) -> None:
        config, self._folder, self._checkpoints = trainer.config, trainer.folder, trainer.folder / "checkpoints"
        self._trainer, self._evaluation, self._console = trainer, evaluation, console
        self._writer = CheckpointWriter(self._checkpoints, config.checkpoint.keep_last_n, config.checkpoint.keep_best_n)
        steps = (trainer.state.step, trainer.schedule.total_steps, trainer.steps_per_epoch)
        self.display = Display(console, config.logging.run_name, *steps)
        self._was_complete, self._heartbeat_at = trainer.complete, 0.0
        step, tensorboard = trainer.state.step, config.logging.tensorboard
        self._wandb = open_wandb(self._folder, config.resolved, step) if config.logging.wandb else None
        self._metrics = MetricsLog(self._folder, tensorboard, step)

    def log(self, line: dict[str, float]) -> None:
        """Record a step; `line` is empty except at logging steps."""
        if line:
            self._metrics.write(self._trainer.state.step, line)
        self.display.update(self._trainer.state)
        if time.monotonic() - self._heartbeat_at >= HEARTBEAT_S:
            self._write_heartbeat("training")

    def _write_heartbeat(self, status: str) -> None:
        self._heartbeat_at, steps = time.monotonic(), self._trainer.schedule.total_steps
        content = {"status": status, "step": self._trainer.state.step, "total_steps": steps}
        content |= {"time": round(time.time(), 1), "pid": os.getpid()}
        with suppress(OSError):  # a full disk is reported where it costs a checkpoint
            write_atomic(self._folder / "heartbeat.json", json.dumps(content) + "\n", durable=False)

    def evaluate(self) -> None:
        """Measure the target encoder and draw, during the run."""
        try:
            values = self._measure()
            shown = [f"{text} {values[name]:.1f} %" for name, text in SHOWN.items() if name in values]
            log.info(f"step {self._trainer.state.step}: {', '.join(shown) or 'nothing measured'}")
            if hint := forgetting(self._trainer.config, self._evaluation.scores):
                log.warning(f"step {self._trainer.state.step}: {hint}")
        except Exception as error:  # noqa: BLE001  # whatever it is: the trainer saves and stops
            self._trainer.error = error

    def _measure(self) -> dict[str, float]:
        """Measure the target encoder and draw the run as it is now; both go to the logs. Returns what was measured."""
        trainer, state = self._trainer, self._trainer.state
        values = self._evaluation.measure()
        state.knn, state.knn_step = values.get("knn"), state.step
        self._metrics.write(state.step, values)
        if not trainer.config.logging.pictures:
            return values
        neighbours, model = self._evaluation.neighbours(QUERIES, NEIGHBOURS), cast(HJEPA, trainer.model)
        for path in draw_run(self._folder, trainer.config, trainer.dataset, model, trainer.masks, neighbours):
            self._metrics.picture(state.step, path)
        return values

    def save(self) -> None:
        """Write a checkpoint in the background, unless the run has diverged."""
        state = self._trainer.state
        # Checkpoints are ranked by the k-NN of their step or, in a run that measures none, by the loss.
        score = None if state.loss_last is None else -state.loss_last
        if self._trainer.config.evaluation.eval_frequency:
            score = state.knn if state.knn_step == state.step else None
        if not self._trainer.diverged:
            self._writer.write(lambda: self._trainer.snapshot(score))

    def wait(self) -> None:
        """Wait until the checkpoint is on disk, or was refused by it."""
        self._writer.wait()

    def finish(self) -> bool:
        """Save the last step, unless the run is complete and has done so. Returns True if it is on disk."""
        try:
            if not self._trainer.complete:
                self._trainer.monitor.read_counts()
                self.save()
            return self._writer.wait()
        except RuntimeError:
            if self._trainer.error is None:
                raise
            return False  # the GPU that failed gives nothing any more

    def report(self) -> int:
        """Measure the trained encoder, draw, and write summary.json and report.html. Returns an exit code.

        A run that was complete before is measured again only for other data or settings of the evaluation.
        """
        folder, state, config = self._folder, self._trainer.state, self._trainer.config
        self._trainer.loader.close()
        try:
            summary = current_summary(folder, state.step, self._evaluation.measured_on) if self._was_complete else None
            if summary is None:
                self._console.print("evaluating and drawing ...", style="dim")
                self._write_heartbeat("evaluating")
                self._measure()
                self._evaluation.mix_back(folder / MIXED, state.step)
                summary = write_summary(self._trainer, self._evaluation, device_name(self._trainer))
            hints = advice(config, summary)
            page = write_page(folder, hints)
        except OSError as error:
            log.error(f"{folder}: the summary could not be written ({error}); the same command tries again")
            return NOT_WRITTEN
        self._console.print(summary_table(summary))
        pictures = f", pictures: {folder / 'figures'}" if config.logging.pictures else ""
        for line in (*hints, f"report: {page}{pictures}"):
            log.info(line)
        if state.step in map(checkpoint_step, list_checkpoints(self._checkpoints)):
            return 0
        log.error(
            f"the weights of step {state.step} are NOT saved: free some space; the same command continues from the last "
            "checkpoint"
        )
        return NOT_WRITTEN

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close(INTERRUPTED if issubclass(kind, KeyboardInterrupt) else LOST)

    def close(self, code: int) -> None:
        """Note how the run ended, given its exit code."""
        self._metrics.close()
        if self._wandb is not None:
            with wandb_may_fail():
                self._wandb.finish(exit_code=code)
        self._write_heartbeat(STATUSES.get(code, "failed"))
