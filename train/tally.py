"""The figures of a run between two lines of its log."""

import resource
from dataclasses import dataclass, field

import torch

from train.distributed import Ranks
from train.output.log import mean_std, rankme
from train.state import RunState

FEATURE_ROWS = 512  # pooled features that the collapse signals are computed on


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


class Speed:
    """Images per second and the share of time spent waiting for data, from one logging step to the next."""

    def __init__(self, state: RunState) -> None:
        self._before = (state.images, state.train_s, state.wait_s)

    def since_last(self, state: RunState) -> dict[str, float]:
        now = (state.images, state.train_s, state.wait_s)
        images, train_s, wait_s = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return {"images_per_s": images / train_s, "data_wait_percent": 100 * wait_s / train_s}


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
