"""Training: a `Trainer` holds what a step needs, `Trainer.train_step` takes one, and `train` is the loop around it."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.losses import random_directions
from model.masks import MaskPlan
from model.teacher import StudentTeacher
from pipeline.dataset import CropBatch, resolve_device
from pipeline.loader import MultiCropLoader
from pipeline.shards.watch import Cancelled
from train import build
from train.checkpoint import Snapshot, Snapshots, load_checkpoint
from train.command import StopSignal
from train.config.schema import Config
from train.distributed import SINGLE_PROCESS, Ranks, Watchdog, no_sync_if, replicated
from train.monitor import StepMonitor
from train.optim import build_optimizer
from train.output.folder import kept_crop_device, run_folder
from train.state import RunState

if TYPE_CHECKING:
    from train.adapt.weights import Start
    from train.recorder import Recorder

log = logging.getLogger(__name__)

# Exit codes of `train`, next to 0.
FAILED = 2  # a rank could not get its next images; the last checkpoint is of the last step
DIVERGED = 3  # too many steps without finite numbers; the last checkpoint is sound
NOT_WRITTEN = 4  # the disk refused the last checkpoint or the summary
STOPPED = 75  # EX_TEMPFAIL: stopped on request, with a checkpoint; the same command continues from it

DIVERGED_ADVICE = (
    "These steps did not change any weights. Lower training.lr or training.grad_clip, lengthen training.warmup_epochs, or set "
    "training.use_amp=false; the same command then continues"
)

Losses = dict[str, torch.Tensor]
LossFunction = Callable[[nn.Module, CropBatch, MaskPlan, torch.Tensor], Losses]


def hjepa_losses(replica: nn.Module, batch: CropBatch, plan: MaskPlan, directions: torch.Tensor) -> Losses:
    return replica(batch.crops, batch.boxes, batch.flips, plan, directions)


class Trainer:
    """The data, model, optimizer and state of a run, built from its config. Writes nothing but `quarantine`.

    `model` replaces the HJEPA of the config by the student and teacher of another method, whose losses, a dict with a scalar
    `loss`, `loss_fn` computes from a replica of the model, crops, masks and SIGReg's directions. `quarantine` is the file to
    which the loader appends samples that it cannot decode; without one it keeps them in memory.
    """

    def __init__(
        self, config: Config, ranks: Ranks = SINGLE_PROCESS, *, model: StudentTeacher | None = None,
        loss_fn: LossFunction | None = None, quarantine: Path | None = None,
    ) -> None:  # fmt: skip
        config = build.with_crop_device(config, ranks, kept_crop_device(config))
        self.config, self.ranks, self.device = config, ranks, ranks.device(resolve_device(config.device))
        training, self.folder = config.training, run_folder(config)
        self.dataset = build.build_dataset(config)
        self.model: StudentTeacher = build.build_model(config, self.device) if model is None else model
        self.start: Start | None = None
        if config.model.weights is not None:
            from train.adapt.weights import start_from  # with its packages, only for runs that need it

            self.start = start_from(self.model, config)
        if training.train_blocks != "all":
            self.model.freeze(int(training.train_blocks.removeprefix("last_")))
        self.masks = build.build_masks(config, self.model, self.device)
        self.loader = build.build_training_loader(config, self.dataset, ranks, quarantine=quarantine)
        self.schedule = build.build_schedule(config, len(self.loader))
        self.steps_per_epoch = len(self.loader) // training.accumulation_steps
        if training.compile:
            mode = "reduce-overhead" if training.compile == "cudagraphs" else None
            self.model.compile(dynamic=False, mode=mode)  # in place: the parameters keep their names
        settings = (training.weight_decay, training.betas, training.optimizer, training.layer_decay)
        self.optimizer = build_optimizer(self.model, *settings)
        self._snapshots = Snapshots(self.model, self.optimizer)
        self._loss_fn, self._replica = loss_fn or hjepa_losses, replicated(self.model, ranks)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._generator = torch.Generator(self.device)
        self._ready = list[CropBatch]()  # the batches of the next step
        self._loader_state: dict[str, Any] | None = None  # from before they were made; None once they are used
        self.error: Exception | None = None
        """Why no further step can be taken; None while all is well."""
        self._start_from(RunState())

    def _start_from(self, state: RunState) -> None:
        """Take the next step from `state`, with the next batch of the loader."""
        self.state, self.monitor = state, StepMonitor(self.device, state)
        self.loader.batches_left = (self.schedule.total_steps - state.step) * self.config.training.accumulation_steps
        self._batches = batches(self.loader, self.config.training.accumulation_steps)

    @property
    def complete(self) -> bool:
        return self.state.step >= self.schedule.total_steps

    @property
    def diverged(self) -> bool:
        """True after too many steps in a row without a finite loss and gradient, as of the monitor's last `read_counts`."""
        return self.state.skipped_in_a_row >= self.config.training.max_skipped_steps

    def is_due(self, frequency: int) -> bool:
        """Return True at every `frequency`-th step; never, if it is 0."""
        return frequency > 0 and self.state.step % frequency == 0

    def snapshot(self, score: float | None) -> Snapshot:
        """Copy what a checkpoint of this step holds, over the last copy. `score` ranks it; higher is better."""
        step, run, loader = self.state.step, self.state.as_dict(), self._loader_state or self.loader.state_dict()
        return self._snapshots.take({"step": step, "run": run, "loader": loader, "score": score})

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError when it is damaged or of another architecture."""
        saved = load_checkpoint(path, self.model, self.optimizer)
        self.loader.load_state_dict(saved["loader"])
        self._ready, self._loader_state = [], None
        # A run that ended because of its skipped steps deserves another try: their count starts at 0 again.
        self._start_from(RunState(**{**saved["run"], "skipped_in_a_row": 0}))
        log.info(f"continuing from {path} (step {self.state.step} of {self.schedule.total_steps})")

    def fetch_batches(self, cancelled: Callable[[], bool]) -> bool:
        """Make the batches of the next step, so that what fails there cannot break the step itself.

        Returns False when `cancelled()` turns true or the data fail; `error` then says why.
        """
        self.loader.watch.cancelled = cancelled
        try:
            if self.error is None:
                self._fetch()
        except Cancelled:
            pass
        except Exception as error:  # noqa: BLE001  # whatever the loader has met: the steps that were taken are saved
            self.error = error
        return self.error is None and not cancelled()

    def _fetch(self) -> None:
        # DALI prefetches batches: this waits only where the loader is slower than the model.
        started, state = time.perf_counter(), self.state
        try:
            self._loader_state = self.loader.state_dict()
            self._ready = [next(self._batches) for _ in range(self.config.training.accumulation_steps)]
        finally:
            waited = time.perf_counter() - started
            state.wait_s, state.train_s = state.wait_s + waited, state.train_s + waited

    def draw(self) -> tuple[torch.Tensor, MaskPlan]:
        """Draw SIGReg's directions and the masks of all images of the next step: the same on all ranks, however many they are."""
        config, step = self.config, self.state.step
        self._generator.manual_seed(step_seed(config.seed, step, 0))
        directions = random_directions(config.model.projector_dim, config.loss.sigreg_slices, self._generator, self.device)
        torch.manual_seed(step_seed(config.seed, step, 1))
        return directions, self.masks(self.loader.global_batch * config.training.accumulation_steps)

    def _backward(self) -> list[Losses]:
        """Add up the gradients of the batches of a step. Returns the losses of each."""
        config, ranks, parts, losses = self.config, self.ranks, len(self._ready), list[Losses]()
        (directions, plan), batch_size = self.draw(), config.data.batch_size
        for part in range(parts):
            batch = self._ready.pop(0)
            self.state.images += len(batch.labels) * ranks.world_size

            # Stochastic depth uses the global generator too: seeded, so that a resumed run draws the same.
            if number := part * ranks.world_size + ranks.rank:
                torch.manual_seed(step_seed(config.seed, self.state.step, number + 1))

            # Forward and backward. Only the last part averages the gradients over the ranks.
            amp = torch.autocast(self.device.type, torch.bfloat16, enabled=build.amp_enabled(config, self.device))
            with no_sync_if(part < parts - 1, self._replica), amp:
                masks = plan.images(slice(number * batch_size, (number + 1) * batch_size))
                losses.append(self._loss_fn(self._replica, batch, masks, directions))
            (losses[-1]["loss"] / parts).backward()
        return losses

    def train_step(self) -> dict[str, float]:
        """Take one optimiser step. Returns its entry of metrics.jsonl at a logging step, else an empty dict."""
        if not self._ready:
            self._fetch()
        config, state, started = self.config, self.state, time.perf_counter()
        lr, momentum = self.schedule.lr(state.step), self.schedule.momentum(state.step)
        losses = self._backward()

        # At the start of some runs only the heads learn: without a gradient, the optimiser leaves the encoder as it is.
        is_heads_only = state.step < self.schedule.heads_steps
        for parameter in self.model.encoder.parameters() if is_heads_only else ():
            parameter.grad = None

        # Clip.
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, config.training.grad_clip or math.inf)

        # Guard. `skip` is 1 on all ranks if a number is not finite on any. It stays on the device, so that nothing waits.
        skip = self.monitor.check([part["loss"] for part in losses], grad_norm)

        # Optimiser. Where `found_inf` is 1, its kernels change nothing.
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.found_inf = skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        # Target: the moving average of the encoder.
        if not is_heads_only:
            self.model.update_target(momentum, skip)

        # Log. Only here does the host wait for the device; at step 1 too, for the first loss of the summary.
        state.step, self._loader_state = state.step + 1, None
        self.monitor.add(losses, grad_norm, skip)
        is_logged = self.is_due(config.logging.log_frequency) or self.complete
        means = self.monitor.read_means(self.ranks) if is_logged or state.step == 1 else {}
        state.bad_samples = len(self.loader.quarantine)
        state.train_s += time.perf_counter() - started
        if not is_logged:
            return {}
        epoch = self.loader.state_dict()["epoch"]
        return {**means, "lr": lr, "ema_momentum": momentum, **self.monitor.end_interval(), "epoch": epoch}


def train(trainer: Trainer, recorder: "Recorder | None", stop: StopSignal) -> int:
    """Train to the end of the schedule; only rank 0 has a recorder. Returns an exit code."""
    config, ranks = trainer.config, trainer.ranks
    eval_steps = config.evaluation.eval_frequency * trainer.steps_per_epoch
    with recorder.display if recorder else nullcontext(), Watchdog(ranks, config.training.timeout_s) as watchdog:
        # Stop all ranks before the same step: when one of them is asked to, or cannot get its images.
        while not trainer.complete and ranks.all(trainer.fetch_batches(lambda: stop.asked)):
            line = trainer.train_step()
            if recorder:
                recorder.log(line)

            # Evaluate. Rank 0 may take minutes while the others wait for it: they do not hang.
            is_evaluated = trainer.is_due(eval_steps) and not trainer.complete
            if is_evaluated:
                watchdog.pause()
                if recorder:
                    recorder.evaluate()
                ranks.barrier()

            # Save. Every rank reads the counts, so that all agree on `diverged`.
            has_score = is_evaluated and config.checkpoint.keep_best_n > 0
            if trainer.is_due(config.checkpoint.save_frequency) or has_score or trainer.complete:
                trainer.monitor.read_counts()
                if recorder:
                    recorder.save()

            if trainer.diverged:
                if recorder:
                    recorder.wait()
                skipped = f"{trainer.state.skipped_in_a_row} steps in a row without a finite loss and gradient"
                log.error(f"step {trainer.state.step}: {skipped}; stopped. {DIVERGED_ADVICE}")
                return DIVERGED
            watchdog.beat()

    # Leave with a checkpoint. torchrun kills the others half a minute after one rank has left, so all wait for rank 0's.
    is_saved = recorder.finish() if recorder else True
    is_well = ranks.all(trainer.error is None)
    if trainer.complete:
        return 0
    go_on = "the same command continues from there" if is_saved else "NOT saved: the checkpoint before it is still there"
    stopped = f"stopped at step {trainer.state.step}; {go_on}"
    if is_well:
        log.info(stopped)
        return STOPPED if is_saved else NOT_WRITTEN
    log.error(f"{trainer.error or 'another rank could not get its images'}; {stopped}")
    if trainer.error is None or (ranks.is_first and isinstance(trainer.error, OSError | ValueError)):
        return FAILED
    raise trainer.error  # a bug, or what a rank has met whose log is not shown


def step_seed(seed: int, step: int, lane: int) -> int:
    """Return a seed for every step and lane, so that a resumed run draws what an uninterrupted one would.

    Lanes 0 and 1 are for what all ranks share; stochastic depth has one of the others for each further part of each rank.
    """
    return ((seed * 1_000_003 + step) * 1_000_003 + lane) % 2**63


def batches(loader: MultiCropLoader, per_step: int = 1) -> Iterator[CropBatch]:
    """Yield epoch after epoch, from where the loader stands, without the last batches of an epoch that fill no step."""
    while True:
        usable = (len(loader.index) - loader.state_dict()["position"]) // loader.global_batch // per_step * per_step
        for number, batch in enumerate(loader):
            if number < usable:
                yield batch
