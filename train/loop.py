"""The training loop: load, mask, step, log, save."""

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from model.hjepa import HJEPA
from model.losses import random_directions
from model.masks import MultiCropMaskGenerator
from pipeline.batch import CropBatch
from pipeline.loader import MultiCropLoader
from train.distributed import Ranks, gradients_kept_back
from train.guard import CollapseAlarm, StepGuard
from train.metrics import mean_std, rankme
from train.optim import ema_momentum, learning_rate
from train.state import RunState

FEATURE_ROWS = 512  # pooled features that the collapse signals are computed on


@dataclass(frozen=True)
class LoopSettings:
    """Plain numbers of the loop. Steps count optimiser updates; learning rates are per update."""

    total_steps: int
    warmup_steps: int
    lr: float
    final_lr: float
    ema_momentum: float
    ema_final_momentum: float
    grad_clip: float | None
    use_amp: bool
    sigreg_slices: int
    projector_dim: int
    seed: int
    accumulation_steps: int
    log_frequency: int
    save_frequency: int
    probe_frequency: int
    save_probed: bool
    max_skipped_steps: int


@dataclass
class Tally:
    """Sums of scalars on the device since the last logging step, so that only logging waits for the device."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    features: list[torch.Tensor] = field(default_factory=list)
    counted: torch.Tensor | float = 0.0

    def add(self, parts: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor, skip: torch.Tensor) -> None:
        """Count one step of several batches' losses, unless `skip` (`[]`, 1.0 or 0.0) says that it was left out."""
        for losses in parts:
            features = losses.pop("features")
            if sum(len(part) for part in self.features) < FEATURE_ROWS:
                self.features.append(features)
        means = {name: sum(losses[name].detach() for losses in parts) / len(parts) for name in parts[0]}
        for name, value in {**means, "grad_norm": grad_norm}.items():
            kept = torch.where(skip > 0, 0.0, value)
            self.sums[name] = self.sums[name] + kept if name in self.sums else kept
        self.counted = self.counted + (1 - skip)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Over the steps that counted and all ranks; without such steps, there are none."""
        totals = ranks.mean(torch.stack(list(self.sums.values())))
        counted = float(self.counted)
        return {name: float(total) / counted for name, total in zip(self.sums, totals, strict=True) if counted}

    def signals(self) -> tuple[dict[str, float], int]:
        """This rank's collapse signals, and how many features they are of; features that are no numbers are left out."""
        features = torch.cat(self.features)
        features = features[features.isfinite().all(dim=1)]
        if len(features) < 2:
            return {}, len(features)
        return {"rankme": rankme(features), "feature_std": mean_std(features)}, len(features)


def step_seed(seed: int, step: int, lane: int) -> int:
    """A seed of its own for every step and lane: a resumed run draws what an uninterrupted one would."""
    return ((seed * 1_000_003 + step) * 1_000_003 + lane) % 2**63


def batches(loader: MultiCropLoader, per_step: int = 1) -> Iterator[CropBatch]:
    """Epoch after epoch, from where the loader stands. The last ones of an epoch are left out if they do not fill a step."""
    while True:
        left = (len(loader.index) - loader.state_dict()["position"]) // loader.global_batch
        usable = left // per_step * per_step
        for number, batch in enumerate(loader):
            if number < usable:
                yield batch


def train_steps(
    model: HJEPA,
    replica: torch.nn.Module,
    masks: MultiCropMaskGenerator,
    optimizer: torch.optim.Optimizer,
    loader: MultiCropLoader,
    state: RunState,
    settings: LoopSettings,
    ranks: Ranks,
    *,
    log: Callable[[dict[str, float]], None],
    tell: Callable[[str], None],
    show: Callable[[], None],
    probe: Callable[[], None],
    save: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """Train from `state.step` to `settings.total_steps`, or until `stop()`; `state` moves along.

    A step whose loss or gradient is not finite changes neither weights nor optimiser nor target. When `max_skipped_steps` of
    them have come in a row, as counted at logging steps, the loop ends.

    `replica` is what `replicated` makes of `model`. `stop` must answer alike on all ranks. `log` gets the means since the last
    logging step, `tell` a line for the user, `show` is called every step, `probe` every `probe_frequency` steps (0: never), and
    `save` every `save_frequency` steps, after the last and, with `save_probed`, after each `probe`.
    """
    device, parts = masks.device, settings.accumulation_steps
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions_generator = torch.Generator(device)
    guard, alarm = StepGuard(device, state), CollapseAlarm(model.encoder.width)
    stream, tally, speed = batches(loader, parts), Tally(), Speed(state)
    model.train()
    while state.step < settings.total_steps and not gone_wrong(state, settings) and not stop():
        started = time.perf_counter()
        # The directions must agree on all ranks.
        directions_generator.manual_seed(step_seed(settings.seed, state.step, 0))
        directions = random_directions(settings.projector_dim, settings.sigreg_slices, directions_generator, device)
        lr = learning_rate(state.step, settings.total_steps, settings.warmup_steps, settings.lr, settings.final_lr)
        momentum = ema_momentum(state.step, settings.total_steps, settings.ema_momentum, settings.ema_final_momentum)
        for group in optimizer.param_groups:
            group["lr"] = lr

        losses = []
        for part in range(parts):
            waiting = time.perf_counter()
            batch = next(stream)
            state.wait_s += time.perf_counter() - waiting
            # Masks and dropout draw from the global generator: by step, and by where the batch lies in the step.
            torch.manual_seed(step_seed(settings.seed, state.step, part * ranks.world_size + ranks.rank + 1))
            plan = masks(len(batch.labels))
            with (
                gradients_kept_back(replica, part < parts - 1),
                torch.autocast(device.type, torch.bfloat16, enabled=settings.use_amp),
            ):
                losses.append(replica(batch.crops, batch.boxes, batch.flips, plan, directions))
            (losses[-1]["loss"] / parts).backward()
            state.images += len(batch.labels) * ranks.world_size
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip or float("inf"))
        skip = guard.check([part["loss"] for part in losses], grad_norm)
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # the fused kernel leaves all as it is where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(momentum, skip)
        tally.add(losses, grad_norm, skip)

        state.step += 1
        last = state.step == settings.total_steps
        due = state.step % settings.log_frequency == 0 or last
        if due or state.step == 1:
            means = tally.means(ranks)
            state.loss_last = means.get("loss", state.loss_last)
            state.loss_first = state.loss_last if state.loss_first is None else state.loss_first
            guard.read(state)
        state.train_s += time.perf_counter() - started
        if due:
            signals, rows = tally.signals()
            if signals and (alarm_text := alarm.check(state, signals, rows)):
                tell(alarm_text)
            means |= signals | {"lr": lr, "ema_momentum": momentum, **speed.since_last(state)}
            state.bad_samples = len(loader.quarantine)
            means |= {"skipped_steps": state.skipped_steps, "collapse_alarm": float(state.collapsed)}
            means["bad_samples"] = state.bad_samples
            log(means | {"peak_memory_bytes": peak_memory(device), "epoch": loader.state_dict()["epoch"]})
            tally = Tally()
        show()
        probed = bool(settings.probe_frequency) and state.step % settings.probe_frequency == 0 and not last
        if probed:
            probe()
        if state.step % settings.save_frequency == 0 or last or (probed and settings.save_probed):
            guard.read(state)
            if not gone_wrong(state, settings):
                save()
    guard.read(state)


class Speed:
    """Images per second and the share of time spent waiting for data, from one logging step to the next."""

    def __init__(self, state: RunState) -> None:
        self._before = (state.images, state.train_s, state.wait_s)

    def since_last(self, state: RunState) -> dict[str, float]:
        now = (state.images, state.train_s, state.wait_s)
        images, train_s, wait_s = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return {"images_per_s": images / train_s, "data_wait_percent": 100 * wait_s / train_s}


def gone_wrong(state: RunState, settings: LoopSettings) -> bool:
    """Whether too many steps in a row had numbers that are not finite."""
    return state.skipped_in_a_row >= settings.max_skipped_steps


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
