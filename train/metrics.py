"""Collapse signals, and the run's record of numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch


def rankme(features: torch.Tensor, eps: float = 1e-7) -> float:
    """The effective rank of `[n, D]` features: exp of the entropy of their singular values (RankMe, arXiv 2210.02885, eq. 1)."""
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(eps) + eps
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_std(features: torch.Tensor) -> float:
    """The mean over dimensions of the standard deviation over samples of unit-length `[n, D]` features; 1/sqrt(D) is ideal."""
    return float(torch.nn.functional.normalize(features.float(), dim=1).std(dim=0).mean())


class MetricsLog:
    """Appends one JSON object per logging step to `folder/metrics.jsonl`, and the same scalars to TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool, start_step: int, say: Callable[[str], None]) -> None:
        self._say, self._told = say, False
        self._path = folder / "metrics.jsonl"
        # A run killed after its last checkpoint repeats some steps: their old lines give way.
        kept = [line for line in read_metrics(folder) if line["step"] <= start_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports half a second of modules

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        try:
            self._file.flush()  # what a full disk refuses stays in the buffer, and is tried again
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._say(f"{self._path}: cannot be written ({error}); training goes on")
        self._told = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self._file.close()
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._tell(error)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, without a last one that a kill cut short."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
