"""The run's record of numbers: metrics.jsonl, TensorBoard and Weights & Biases."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline.files import write_atomic

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object per logging step to `folder/metrics.jsonl`; the same scalars go to TensorBoard and wandb.

    Training continues when the log cannot be written: the first such error is logged. `wandb`: a run of that package, or None.
    """

    def __init__(self, folder: Path, tensorboard: bool, start_step: int, wandb: Any = None) -> None:
        self._failed, self._lock, self._wandb = False, threading.Lock(), wandb
        self._path = folder / "metrics.jsonl"
        _drop_lines_after(self._path, start_step)
        self._file = self._path.open("a")
        self._writer: Any = None
        self._previous_hook = threading.excepthook
        if tensorboard:
            threading.excepthook = self._on_thread_error  # TensorBoard writes in a background thread
            from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

            with self._errors_logged():
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self._errors_logged():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()  # what a full disk refuses stays in the buffer until the next flush
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show `[H, W, 3] uint8` in TensorBoard."""
        if self._writer is not None:
            with self._errors_logged():
                self._writer.add_image(name, pixels, step, dataformats="HWC")

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            self._previous_hook(failure)
            return
        with self._errors_logged():
            raise failure.exc_value

    @contextmanager
    def _errors_logged(self) -> Iterator[None]:
        """Turn OSErrors into a warning, once per log, whichever thread they happen in."""
        try:
            yield
        except OSError as error:
            with self._lock:
                if not self._failed:
                    log.warning(f"{self._path.parent}: the log cannot be written ({error}); training continues")
                self._failed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for output in (self._file, self._writer):
            with self._errors_logged():
                if output is not None:
                    output.close()
        threading.excepthook = self._previous_hook


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop an incomplete last line, and those of steps that a run killed after its last checkpoint repeats."""
    text = "".join(json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step)
    if path.exists() and path.read_text() != text:
        write_atomic(path, text)  # so that a full disk does not cost the complete log


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `folder/metrics.jsonl`, without an incomplete last one."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def open_wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    """Return a wandb run, named after the run's folder, that continues when the run does."""
    import wandb  # train.run has checked that it is installed

    name = folder.name
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=folder, config=settings)
