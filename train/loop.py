"""The training loop: load, mask, step, log, save."""

import time
from collections.abc import Callable, Iterator

import torch

from model.hjepa import HJEPA
from model.masks import MultiCropMaskGenerator
from pipeline.batch import CropBatch
from pipeline.loader import MultiCropLoader
from train.distributed import Ranks
from train.guard import CollapseAlarm, StepGuard
from train.state import RunState
from train.step import LoopSettings, Outcome, Updater
from train.tally import Speed, Tally, peak_memory


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
    guard, alarm = StepGuard(masks.device, state), CollapseAlarm(model.encoder.width)
    updater = Updater(model, replica, masks, optimizer, guard, settings, ranks)
    stream, tally, speed = batches(loader, settings.accumulation_steps), Tally(), Speed(state)
    model.train()
    while state.step < settings.total_steps and not gone_wrong(state, settings) and not stop():
        started = time.perf_counter()
        outcome = updater.take(stream, state)
        tally.add(outcome.losses, outcome.grad_norm, outcome.skip)
        state.step += 1
        last = state.step == settings.total_steps
        due = state.step % settings.log_frequency == 0 or last
        means = note_losses(tally, guard, state, ranks) if due or state.step == 1 else {}
        state.train_s += time.perf_counter() - started
        if due:
            state.bad_samples = len(loader.quarantine)
            means |= collapse_signals(tally, alarm, state, tell) | figures(outcome, state, speed)
            log(means | {"peak_memory_bytes": peak_memory(masks.device), "epoch": loader.state_dict()["epoch"]})
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


def note_losses(tally: Tally, guard: StepGuard, state: RunState, ranks: Ranks) -> dict[str, float]:
    """The means since the last logging step; waits for the device. `state` gets the loss and the counts of left-out steps."""
    means = tally.means(ranks)
    state.loss_last = means.get("loss", state.loss_last)
    state.loss_first = state.loss_last if state.loss_first is None else state.loss_first
    guard.read(state)
    return means


def collapse_signals(
    tally: Tally, alarm: CollapseAlarm, state: RunState, tell: Callable[[str], None]
) -> dict[str, float]:
    """RankMe and standard deviation of the pooled features; a ringing alarm is told."""
    signals, rows = tally.signals()
    if signals and (text := alarm.check(state, signals, rows)):
        tell(text)
    return signals


def figures(outcome: Outcome, state: RunState, speed: Speed) -> dict[str, float]:
    """What a logging step says beside losses and signals."""
    return {
        "lr": outcome.lr,
        "ema_momentum": outcome.momentum,
        **speed.since_last(state),
        "skipped_steps": state.skipped_steps,
        "collapse_alarm": float(state.collapsed),
        "bad_samples": state.bad_samples,
    }


def gone_wrong(state: RunState, settings: LoopSettings) -> bool:
    """Whether too many steps in a row had numbers that are not finite."""
    return state.skipped_in_a_row >= settings.max_skipped_steps
