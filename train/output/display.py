"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere, and the table at the end."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from train.monitor import RunState

PLAIN_EVERY_S = 5.0
LOADING = "loading torch, DALI and timm ..."  # about ten seconds of imports: nobody shall take them for a hang
WIDE = 132  # columns of a terminal that has room for more than the figures


class Display:
    """Shows one run. Used as a context; `update` may be called every step, it draws a few times a second at most."""

    def __init__(self, console: Console, run_name: str, step: int, total_steps: int, steps_per_epoch: int) -> None:
        self._console, self._name, self._total, self._steps_per_epoch = console, run_name, total_steps, steps_per_epoch
        self._first_step, self._started, self._plain_at = step, time.monotonic(), 0.0
        self._progress: Progress | None = None
        if console.is_terminal:
            named = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
            figures = TextColumn("{task.fields[figures]}")
            left = (TextColumn("ETA"), TimeRemainingColumn())
            wide = console.width >= WIDE
            columns = (*named, figures, TimeElapsedColumn(), *left) if wide else (figures, *left)
            self._progress = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._progress.add_task(run_name, total=total_steps, completed=step, figures="")

    def update(self, state: RunState) -> None:
        """Show the run's figures so far: speed and data wait are means over the whole run, the loss is the latest logged."""
        step = state.step
        shown = "-" if state.loss_last is None else f"{state.loss_last:.4f}"
        epoch, epochs = step / self._steps_per_epoch, self._total / self._steps_per_epoch
        speed, wait = state.images / state.train_s, 100 * state.wait_s / state.train_s
        figures = f"epoch {epoch:.1f}/{epochs:.4g} · loss {shown} · {speed:.0f} images/s · data wait {wait:.0f}%"
        if state.bad_samples:
            figures += f" · {state.bad_samples} bad samples replaced"
        if state.skipped_steps:
            figures += f" · {state.skipped_steps} steps left out"
        if state.collapsed:
            figures += " · COLLAPSE ALARM"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._plain_at >= PLAIN_EVERY_S or step == self._total:
            self._plain_at = now
            rate = (step - self._first_step) / max(now - self._started, 1e-9)
            left = time.strftime("%H:%M:%S", time.gmtime((self._total - step) / rate)) if rate else "-"
            self._console.print(f"{self._name}: step {step}/{self._total} · {figures} · ETA {left}", highlight=False)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()


KNN_NAMES = {
    "pixels": "k-NN, raw pixels",
    "colour_histogram": "k-NN, colour histogram",
    "random_init": "k-NN, random initialisation",
    "trained": "k-NN, trained encoder",
}


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of `summary`, which is what summary.json holds."""
    rows = [
        ("images seen", f"{summary['images']:,}"),
        ("images/s", f"{summary['images_per_s']:.0f}"),
        ("data wait", f"{summary['data_wait_percent']:.1f} %"),
    ]
    if summary["loss_first"] is not None:
        rows.append(("loss, first -> last", f"{summary['loss_first']:.4f} -> {summary['loss_last']:.4f}"))
    if summary["bad_samples"]:
        rows.append(("bad samples, replaced", f"{summary['bad_samples']:,}, see quarantine.jsonl"))
    if summary["skipped_steps"]:
        rows.append(("steps left out, not finite", f"{summary['skipped_steps']:,}"))
    if summary["collapse_alarms"]:
        rows.append(("collapse alarms at steps", ", ".join(map(str, summary["collapse_alarms"]))))
    if summary["rankme"] is not None:
        most = min(summary["width"], summary["validation_images"])
        rows.append(("RankMe of the trained features", f"{summary['rankme']:.1f} of {most}"))
        rows.append(("validation images", f"{summary['validation_images']:,}"))
    if summary["knn"] is not None:
        rows += [(name, f"{summary['knn'][key]:.1f} %") for key, name in KNN_NAMES.items()]
    if summary["linear"] is not None:
        rows.append(("linear probe, trained encoder", f"{summary['linear']:.1f} %"))
    return rows


def summary_table(summary: dict[str, Any]) -> Table:
    """The run in one table."""
    table = Table(title=f"{summary['run_name']}: {summary['steps']} steps", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = summary_rows(summary)
    for number, row in enumerate(rows, 1):
        is_last_before_knn = number < len(rows) and rows[number][0] == KNN_NAMES["pixels"]
        table.add_row(*row, end_section=is_last_before_knn)
    return table
