"""How well training goes between two logging steps: losses, skipped steps, collapse, throughput and memory."""

import logging
from dataclasses import replace

import torch
import torch.distributed as dist

from pipeline.memory import peak_memory
from train.distributed import Ranks
from train.evaluation.measure import feature_std, rankme
from train.state import RunState

log = logging.getLogger(__name__)

MAX_FEATURES = 512  # rows of the collapse signals: enough for a stable RankMe, and cheap to decompose
# The alarm's thresholds. RankMe: a share of the largest possible value; healthy runs of small encoders stay above twice that.
# Standard deviation: a share of the first logged one.
MIN_RANK_SHARE, MIN_STD_SHARE = 0.05, 0.01
EARLY_STEPS = 100  # the rank of healthy runs can pass below its threshold in them
RECOVERED = 1.5  # times the thresholds end the alarm, so that a signal near one does not raise it at every step


class StepMonitor:
    """Follows the steps on the device, so that only a logging step waits for it, and keeps `state` up to date."""

    def __init__(self, device: torch.device, state: RunState) -> None:
        self._device, self._state = device, state
        self._skipped = torch.tensor(float(state.skipped_steps), device=device, dtype=torch.float64)
        self._skipped_in_a_row = torch.tensor(float(state.skipped_in_a_row), device=device)
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._before = replace(self._state)
        self._sums: dict[str, torch.Tensor] = {}
        self._features: list[torch.Tensor] = []
        self._counted = torch.zeros((), device=self._device)

    def check(self, losses: list[torch.Tensor], grad_norm: torch.Tensor) -> torch.Tensor:
        """Count a step. Returns `[] float32`: 1.0 if one of the numbers is not finite on any rank, else 0.0."""
        skip = 1 - torch.stack([*losses, grad_norm]).detach().isfinite().all().float()
        if dist.is_initialized():
            dist.all_reduce(skip, dist.ReduceOp.MAX)  # all ranks must skip the same steps
        self._skipped += skip
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * skip
        return skip

    def add(self, parts: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor, skip: torch.Tensor) -> None:
        """Add the losses of a step, a dict for each of its batches, unless `skip` is 1."""
        for losses in parts:
            features = losses.pop("features", None)
            if features is not None and sum(map(len, self._features)) < MAX_FEATURES:
                self._features.append(features.clone())  # CUDA graphs write the next step's over it
        means = {name: sum(losses[name].detach() for losses in parts) / len(parts) for name in parts[0]}
        for name, value in {**means, "grad_norm": grad_norm}.items():
            kept = torch.where(skip > 0, 0.0, value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        self._counted = self._counted + (1 - skip)

    def read_counts(self) -> None:
        """Put the counts of skipped steps into the state. Waits for the device."""
        self._state.skipped_steps, self._state.skipped_in_a_row = int(self._skipped), int(self._skipped_in_a_row)

    def read_means(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean losses over all ranks and all steps that were not skipped; empty if all were. Waits for the device."""
        totals, counted = ranks.mean(torch.stack(list(self._sums.values()))), float(self._counted)
        means = {name: float(total) / counted for name, total in zip(self._sums, totals, strict=True) if counted}
        if "loss" in means:
            self._state.loss_last, self._state.loss_step = means["loss"], self._state.step
        if self._state.loss_first is None:
            self._state.loss_first = self._state.loss_last
        self.read_counts()
        return means

    def end_interval(self) -> dict[str, float]:
        """Return what metrics.jsonl records next to the losses, and begin the next interval."""
        signals, before, now = {}, self._before, self._state
        features = torch.cat([features[features.isfinite().all(dim=1)] for features in self._features or [torch.empty(0, 1)]])
        if len(features) > 1:
            signals = {"rankme": rankme(features), "feature_std": feature_std(features)}
            watch_for_collapse(now, signals["rankme"], signals["feature_std"], min(features.shape))
        self._begin_interval()
        seconds = now.train_s - before.train_s
        signals["images_per_s"] = (now.images - before.images) / seconds
        signals["data_wait_percent"] = 100 * (now.wait_s - before.wait_s) / seconds
        counts = {"skipped_steps": now.skipped_steps, "collapse_alarm": float(now.collapsed), "bad_samples": now.bad_samples}
        return {**signals, **counts, **memory_metrics(self._device)}


def watch_for_collapse(state: RunState, rank: float, std: float, max_rank: int) -> None:
    """Log an alarm, and note it in `state`, when features span almost no dimensions or are almost one point.

    The alarm is raised once, and again only after both signals have recovered.
    """
    if state.first_feature_std is None:
        state.first_feature_std = std
    min_rank, min_std = max(2.0, MIN_RANK_SHARE * max_rank), MIN_STD_SHARE * state.first_feature_std
    if state.collapsed:
        state.collapsed = rank < RECOVERED * min_rank or std < RECOVERED * min_std
    elif (rank < min_rank and state.step >= EARLY_STEPS) or std < min_std:
        state.collapsed = True
        state.alarms.append(state.step)
        log.warning(
            f"collapse alarm at step {state.step}: RankMe {rank:.2f} (alarm below {min_rank:.2f}), feature std "
            f"{std:.2g} (alarm below {min_std:.2g}). The features of all images are becoming the same: raise "
            "loss.view_weight or loss.sigreg_weight, lower training.lr, or bring training.ema_momentum nearer to 1"
        )


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return bytes. `peak_memory_bytes`: the most that torch allocated on the GPU, or that this process had resident.

    `device_memory_bytes`: in use on the GPU now, including DALI's pool, the CUDA context and other processes.
    """
    if device.type != "cuda":
        return {"peak_memory_bytes": peak_memory()}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "device_memory_bytes": total - free}
