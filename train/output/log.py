"""The numbers of a run: metrics.jsonl and TensorBoard, and curves of what was logged."""

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.files import open_append, write_atomic
from pipeline.shards.manifest import read_json_lines

Curve = list[tuple[float, float]]
"""Points `(step, value)`, in order."""
MetricLines = Sequence[Mapping[str, Any]]
"""The lines of a metrics.jsonl."""

PANELS = {
    "Loss": ("loss",),
    "Prediction loss by level": ("level_0", "level_1", "level_2", "level_3", "summary"),
    "View term": ("view",),
    "SIGReg": ("sigreg",),
    "Colour term": ("colour",),
    "k-NN and linear probe during the run, %": ("knn", "linear"),
    "Placement accuracy during the run, %": ("placement", "placement_level_0", "placement_level_1", "placement_level_2"),
    "RankMe of pooled features": ("rankme",),
    "Images per second": ("images_per_s",),
    "Data wait, % of the step": ("data_wait_percent",),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad_norm",),
}
MAX_NUMBER = 1e100  # of a metric: others come from no run, and many a curve cannot hold them

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object per logging step to `folder/metrics.jsonl`; the same scalars go to TensorBoard.

    Training continues when the log cannot be written: the first such error is logged.
    """

    def __init__(self, folder: Path, tensorboard: bool, start_step: int) -> None:
        self._folder, self._writer, self._failed = folder, None, False
        _drop_lines_after(folder / "metrics.jsonl", start_step)
        self._file = open_append(folder / "metrics.jsonl")
        self._previous_hook = threading.excepthook
        if tensorboard:
            threading.excepthook = self._on_thread_error
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

    def picture(self, step: int, path: Path) -> None:
        """Show a picture file in TensorBoard, under its name."""
        if self._writer is not None:
            with self._errors_logged():
                picture = Image.open(path)
                sheet = Image.new("RGB", picture.size, "white")
                sheet.paste(picture, mask=picture)  # it is transparent where it is empty
                self._writer.add_image(path.stem, np.asarray(sheet), step, dataformats="HWC")

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own. Its next write, or closing it, raises the same error, which is logged there.
        if "tensorboard" not in type(failure.thread).__module__ or not isinstance(failure.exc_value, OSError):
            self._previous_hook(failure)

    @contextmanager
    def _errors_logged(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning(f"{self._folder}: the log cannot be written ({error}); training continues")
            self._failed = True

    def close(self) -> None:
        for output in (self._file, self._writer):
            with self._errors_logged():
                if output is not None:
                    output.close()
        threading.excepthook = self._previous_hook


@contextmanager
def wandb_may_fail() -> Iterator[None]:
    """Log what Weights & Biases raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever it is, the training goes on
        log.warning(f"Weights & Biases failed ({error}); training continues without it")


def open_wandb(folder: Path, settings: dict[str, Any], start_step: int) -> Any:
    """Return a run of Weights & Biases, which gets what TensorBoard writes from now on; None if that fails.

    It has the folder's name. Its id is new at step 0, and kept in `folder/wandb_id` from then on.
    """
    with wandb_may_fail():
        import wandb  # train.run has checked that it is installed

        path, project = folder / "wandb_id", os.environ.get("WANDB_PROJECT", "hjepa")
        named = {"name": folder.name, "id": path.read_text().strip() if start_step and path.exists() else None}
        run = wandb.init(project=project, **named, resume="allow", dir=folder, config=settings, sync_tensorboard=True)
        write_atomic(path, f"{run.id}\n")
        return run
    return None


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop an incomplete last line, and those of steps that a run killed after its last checkpoint repeats."""
    text = "".join(json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step)
    if path.exists() and path.read_text() != text:
        write_atomic(path, text)  # so that a full disk does not cost the complete log


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `folder/metrics.jsonl`, numbers only, up to the first that is incomplete or none of ours."""
    path = folder / "metrics.jsonl"
    lines = []
    for line in read_json_lines(path) if path.exists() else ():
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and abs(value) < MAX_NUMBER}
        if not isinstance(numbers.get("step"), int):
            break
        lines.append(numbers)
    return lines


def curves_by_panel(runs: Mapping[str, MetricLines]) -> dict[str, dict[str, Curve]]:
    """Return the curves of each of PANELS that some run has logged, by name: the metrics of a single run, or the runs.

    With several runs, each panel shows one metric.
    """
    panels: dict[str, dict[str, Curve]] = {}
    for title, metrics in PANELS.items():
        for metric in metrics:
            for run, lines in runs.items():
                points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
                panel = title if len(runs) == 1 or len(metrics) == 1 else f"{title}: {metric}"
                if points or len(runs) > 1:  # a run without points keeps its colour
                    panels.setdefault(panel, {})[metric if len(runs) == 1 else run] = points
    return {panel: curves for panel, curves in panels.items() if any(curves.values())}
