"""How far a run is and how well it goes: its counts, guards against non-finite steps and failing stores, the collapse alarm,
the heartbeat."""

import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pipeline.shards.fetcher import Cancelled
from pipeline.shards.object_store import StoreError
from train.distributed import Ranks
from train.evaluation.measure import feature_std, rankme
from train.state import RunState

if TYPE_CHECKING:
    from pipeline.loader import MultiCropLoader

log = logging.getLogger(__name__)

FEATURE_ROWS = 512  # pooled features that the collapse signals are computed on
HEARTBEAT_S = 5.0


class StepGuard:
    """Decides on the device whether a step counts, so that no step waits for it; only `read` does."""

    def __init__(self, device: torch.device, state: RunState) -> None:
        self._skipped = torch.tensor(float(state.skipped_steps), device=device, dtype=torch.float64)
        self._in_a_row = torch.tensor(float(state.skipped_in_a_row), device=device)

    def check(self, losses: list[torch.Tensor], grad_norm: torch.Tensor) -> torch.Tensor:
        """`[] float32`: 1.0 if one of them is infinite or not a number, on any rank, else 0.0. Counts the step."""
        skip = 1 - torch.stack([*losses, grad_norm]).detach().isfinite().all().float()
        if dist.is_initialized():
            dist.all_reduce(skip, dist.ReduceOp.MAX)  # all ranks must skip the same steps
        self._skipped += skip
        self._in_a_row = (self._in_a_row + 1) * skip
        return skip

    def read(self, state: RunState) -> None:
        """Put the counts into `state`; waits for the device."""
        state.skipped_steps, state.skipped_in_a_row = int(self._skipped), int(self._in_a_row)


class CollapseAlarm:
    """Raised when the pooled features of a logging step span almost no dimensions, or are almost one point.

    It is raised once, and again only after both signals have recovered. Its memory is in `RunState`.
    """

    RANK_SHARE = 0.05  # of the greatest possible RankMe; healthy runs of small encoders stay above twice that
    STD_SHARE = 0.01  # of the first logged standard deviation
    RECOVERED = 1.5  # times the thresholds, so that a signal at the threshold does not raise it at every step

    def __init__(self, width: int) -> None:
        self._width = width

    def check(self, state: RunState, signals: dict[str, float], rows: int) -> None:
        """`signals`: `rankme` and `feature_std` of `rows` features. A raised alarm is logged and noted in `state`."""
        rank, std = signals["rankme"], signals["feature_std"]
        if state.first_feature_std is None:
            state.first_feature_std = std
        least_rank = max(2.0, self.RANK_SHARE * min(self._width, rows))
        least_std = self.STD_SHARE * state.first_feature_std
        if state.collapsed:
            state.collapsed = rank < self.RECOVERED * least_rank or std < self.RECOVERED * least_std
        elif rank < least_rank or std < least_std:
            state.collapsed = True
            state.alarms.append(state.step)
            log.warning(
                f"collapse alarm at step {state.step}: RankMe {rank:.2f} (alarm below {least_rank:.2f}), feature std "
                f"{std:.2g} (alarm below {least_std:.2g}). The features of all images are becoming the same: raise "
                "loss.view_weight or loss.sigreg_weight, lower training.lr, or bring training.ema_momentum nearer to 1"
            )


class RunningMeans:
    """Sums of scalars on the device since the last logging step, so that only logging waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._features: list[torch.Tensor] = []
        self._counted: torch.Tensor | float = 0.0

    def add(self, parts: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor, skip: torch.Tensor) -> None:
        """Count the losses of one step, a dict for each of its batches, unless `skip` (`[]`, 1.0 or 0.0) is 1."""
        for losses in parts:
            features = losses.pop("features")
            if sum(len(part) for part in self._features) < FEATURE_ROWS:
                self._features.append(features)
        means = {name: sum(losses[name].detach() for losses in parts) / len(parts) for name in parts[0]}
        for name, value in {**means, "grad_norm": grad_norm}.items():
            kept = torch.where(skip > 0, 0.0, value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        self._counted = self._counted + (1 - skip)

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The means over all ranks and the steps that counted; empty if none did. Waits for the device."""
        totals = ranks.mean(torch.stack(list(self._sums.values())))
        counted = float(self._counted)
        return {name: float(total) / counted for name, total in zip(self._sums, totals, strict=True) if counted}

    def collapse_signals(self) -> tuple[dict[str, float], int]:
        """`rankme` and `feature_std` of this rank's finite features, and how many these are; empty for fewer than two."""
        features = torch.cat(self._features)
        features = features[features.isfinite().all(dim=1)]
        if len(features) < 2:
            return {}, len(features)
        return {"rankme": rankme(features), "feature_std": feature_std(features)}, len(features)


class Speed:
    """Images per second and the share of time spent waiting for data, from one logging step to the next."""

    def __init__(self, state: RunState) -> None:
        self._before = self._totals(state)

    @staticmethod
    def _totals(state: RunState) -> tuple[float, ...]:
        return state.images, state.train_s, state.wait_s, state.store_wait_s

    def since_last(self, state: RunState) -> dict[str, float]:
        now = self._totals(state)
        images, train_s, wait_s, store_wait_s = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return {
            "images_per_s": images / train_s,
            "data_wait_percent": 100 * wait_s / train_s,
            "store_wait_percent": 100 * store_wait_s / train_s,
        }


class StoreGuard:
    """Has the shards of every step here before it begins: on a failing store the run can still save what it has."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._counted = 0.0

    def failed(self, loader: "MultiCropLoader", batches: int, state: RunState, stopped: Callable[[], bool]) -> bool:
        """Wait for the shards of the next `batches` batches, unless `stopped`; whether they do not come, and why in `error`."""
        started = time.perf_counter()
        try:
            if self.error is None:
                loader.prepare(batches, stopped)
        except Cancelled:
            pass  # the caller asks as well
        except OSError as error:  # of the store, or of the cache's disk
            self.error = error
        waited = time.perf_counter() - started
        state.wait_s, state.train_s = state.wait_s + waited, state.train_s + waited
        state.store_wait_s += loader.store_wait_s - self._counted
        self._counted = loader.store_wait_s
        return self.error is not None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """End what reads the store where this fails: no further step begins, and those before are saved."""
        try:
            yield
        except StoreError as error:
            self.error = error


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes. `peak_memory_bytes`: allocated by torch on the GPU at most, or resident in this process at most.

    `device_memory_bytes`: in use on the GPU now, by DALI's pool, the CUDA context and other processes too.
    """
    if device.type != "cuda":
        return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "device_memory_bytes": total - free}


class Heartbeat:
    """`heartbeat.json`: `{status, step, total_steps, time, pid}`, replaced atomically; `time` is seconds since 1970.

    Statuses: training, evaluating and, at the end, complete, stopped (run it again), diverged or failed.
    """

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._path, self._total, self._at = folder / "heartbeat.json", total_steps, 0.0

    def beat(self, state: RunState) -> None:
        """Every few seconds, however often it is called."""
        if time.monotonic() - self._at >= HEARTBEAT_S:
            self.write("training", state)

    def write(self, status: str, state: RunState) -> None:
        self._at = time.monotonic()
        line = {
            "status": status,
            "step": state.step,
            "total_steps": self._total,
            "time": round(time.time(), 1),
            "pid": os.getpid(),
        }
        temporary = self._path.with_suffix(".partial")
        with suppress(OSError):  # a full disk is reported where it costs a checkpoint
            temporary.write_text(json.dumps(line) + "\n")
            temporary.replace(self._path)
