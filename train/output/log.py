"""Collapse signals, and the run's record of numbers."""

import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object per logging step to `folder/metrics.jsonl`; the same scalars go to TensorBoard and wandb.

    `wandb`: a run of that package, or None.
    """

    def __init__(self, folder: Path, tensorboard: bool, start_step: int, wandb: Any = None) -> None:
        self._reported, self._lock, self._wandb = False, threading.Lock(), wandb
        self._path = folder / "metrics.jsonl"
        _drop_lines_after(self._path, start_step)
        self._file = self._path.open("a")
        self._writer: Any = None
        self._hook_before = threading.excepthook
        if tensorboard:
            threading.excepthook = self._on_thread_error  # TensorBoard writes in a thread of its own
            from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

            try:
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
            except OSError as error:
                self._report(error)

    def write(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()  # what a full disk refuses stays in the buffer and is tried again
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._report(error)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show `[H, W, 3] uint8` in TensorBoard."""
        try:
            if self._writer is not None:
                self._writer.add_image(name, pixels, step, dataformats="HWC")
        except OSError as error:
            self._report(error)

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        if isinstance(failure.exc_value, OSError):
            self._report(failure.exc_value)
        else:
            self._hook_before(failure)

    def _report(self, error: OSError) -> None:
        """Once for each log, whichever thread it happens in."""
        with self._lock:
            if not self._reported:
                log.warning(f"{self._path.parent}: the log cannot be written ({error}); training continues")
            self._reported = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for output in (self._file, self._writer):
            try:
                if output is not None:
                    output.close()
            except OSError as error:
                self._report(error)
        threading.excepthook = self._hook_before


def _drop_lines_after(path: Path, step: int) -> None:
    """A run killed after its last checkpoint repeats some steps: their old lines are dropped, as is an incomplete one."""
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.exists() and path.read_text() != text:
        temporary = path.with_suffix(".partial")  # so that a full disk does not cost the whole log
        temporary.write_text(text)
        temporary.replace(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, without an incomplete last one."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def open_wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    """A wandb run, named after the run's folder, that continues when the run does."""
    import wandb  # train.run has checked that it is installed

    name = folder.name
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=folder, config=settings)
