"""How well training goes: skipped steps, mean losses, collapse, throughput and memory between two logging steps."""

import logging
import resource

import torch
import torch.distributed as dist

from train.distributed import Ranks
from train.evaluation.measure import feature_std, rankme
from train.state import RunState

log = logging.getLogger(__name__)

MAX_FEATURE_ROWS = 512  # of the collapse signals: enough for a stable RankMe, cheap to decompose


class StepGuard:
    """Decides on the device which steps count, so that no step waits for it; only `read` does."""

    def __init__(self, device: torch.device, state: RunState) -> None:
        self._skipped = torch.tensor(float(state.skipped_steps), device=device, dtype=torch.float64)
        self._in_a_row = torch.tensor(float(state.skipped_in_a_row), device=device)

    def check(self, losses: list[torch.Tensor], grad_norm: torch.Tensor) -> torch.Tensor:
        """Return `[] float32`: 1.0 if a loss or the norm is not finite on any rank, else 0.0. Counts the step."""
        skip = 1 - torch.stack([*losses, grad_norm]).detach().isfinite().all().float()
        if dist.is_initialized():
            dist.all_reduce(skip, dist.ReduceOp.MAX)  # all ranks must skip the same steps
        self._skipped += skip
        self._in_a_row = (self._in_a_row + 1) * skip
        return skip

    def read(self, state: RunState) -> None:
        """Copy the counts to `state`. Waits for the device."""
        state.skipped_steps, state.skipped_in_a_row = int(self._skipped), int(self._in_a_row)


class RunningMeans:
    """Sums of the losses on the device since the last logging step, and a sample of the features."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._features: list[torch.Tensor] = []
        self._counted: torch.Tensor | float = 0.0

    def add(self, parts: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor, skip: torch.Tensor) -> None:
        """Add the losses of one step, a dict for each of its batches, unless `skip` (`[]`, 1.0 or 0.0) is 1."""
        for losses in parts:
            features = losses.pop("features", None)
            if features is not None and sum(map(len, self._features)) < MAX_FEATURE_ROWS:
                self._features.append(features)
        means = {name: sum(losses[name].detach() for losses in parts) / len(parts) for name in parts[0]}
        for name, value in {**means, "grad_norm": grad_norm}.items():
            kept = torch.where(skip > 0, 0.0, value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        self._counted = self._counted + (1 - skip)

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Return the means over all ranks and all steps that count; empty if none does. Waits for the device."""
        totals = ranks.mean(torch.stack(list(self._sums.values())))
        counted = float(self._counted)
        return {name: float(total) / counted for name, total in zip(self._sums, totals, strict=True) if counted}

    def collapse_signals(self) -> tuple[dict[str, float], int]:
        """Return `rankme` and `feature_std` of this rank's finite features, and their number; empty for fewer than two."""
        features = torch.cat(self._features) if self._features else torch.empty(0, 1)
        features = features[features.isfinite().all(dim=1)]
        if len(features) < 2:
            return {}, len(features)
        return {"rankme": rankme(features), "feature_std": feature_std(features)}, len(features)


class CollapseAlarm:
    """Warns when the features of a logging step span almost no dimensions, or are almost one point.

    It rings once, and again only after both signals have recovered. `RunState` remembers it across restarts.
    """

    MIN_RANK_SHARE = 0.05  # of the largest possible RankMe; healthy runs of small encoders stay above twice that
    MIN_STD_SHARE = 0.01  # of the first logged standard deviation
    RECOVERED = 1.5  # times the thresholds, so that a signal near one does not ring at every step

    def __init__(self, width: int) -> None:
        self._width = width

    def check(self, state: RunState, signals: dict[str, float], rows: int) -> None:
        """Compare `rankme` and `feature_std` of `rows` features with their thresholds; note an alarm in `state` and log it."""
        rank, std = signals["rankme"], signals["feature_std"]
        if state.first_feature_std is None:
            state.first_feature_std = std
        min_rank = max(2.0, self.MIN_RANK_SHARE * min(self._width, rows))
        min_std = self.MIN_STD_SHARE * state.first_feature_std
        if state.collapsed:
            state.collapsed = rank < self.RECOVERED * min_rank or std < self.RECOVERED * min_std
        elif rank < min_rank or std < min_std:
            state.collapsed = True
            state.alarms.append(state.step)
            log.warning(
                f"collapse alarm at step {state.step}: RankMe {rank:.2f} (alarm below {min_rank:.2f}), feature std "
                f"{std:.2g} (alarm below {min_std:.2g}). The features of all images are becoming the same: raise "
                "loss.view_weight or loss.sigreg_weight, lower training.lr, or bring training.ema_momentum nearer to 1"
            )


def throughput(before: RunState, now: RunState) -> dict[str, float]:
    """Return images per second between two states, and the percentages of the time spent waiting for data."""
    seconds = now.train_s - before.train_s
    return {
        "images_per_s": (now.images - before.images) / seconds,
        "data_wait_percent": 100 * (now.wait_s - before.wait_s) / seconds,
        "store_wait_percent": 100 * (now.store_wait_s - before.store_wait_s) / seconds,
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return bytes. `peak_memory_bytes`: the most that torch allocated on the GPU, or that this process had resident.

    `device_memory_bytes`: in use on the GPU now, also by DALI's pool, the CUDA context and other processes.
    """
    if device.type != "cuda":
        return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "device_memory_bytes": total - free}
