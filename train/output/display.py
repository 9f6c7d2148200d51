"""What a person sees while a command works: a live bar in a terminal, plain lines elsewhere, and a run's table at its end."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from train.state import RunState

PLAIN_EVERY_S = 5.0
LOADING = "loading torch, DALI and timm ..."  # ten seconds of imports, which would look like a hang
WIDE = 132  # columns of a terminal that has room for more than the details


class ProgressDisplay:
    """Progress of a command. Used as a context; `show` may be called often, it draws a few times a second at most.

    A `transient` one clears its bar at the end; short work leaves no plain line at all.
    """

    def __init__(
        self, console: Console, name: str, unit: str, total: int, start: int = 0, transient: bool = False
    ) -> None:
        self._console, self._name, self._unit, self._total, self._start = console, name, unit, total, start
        self._started, self._transient = time.monotonic(), transient
        self._plain_at, self._printed = self._started if transient else 0.0, start
        named = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        details, left = TextColumn("{task.fields[details]}"), (TextColumn("ETA"), TimeRemainingColumn())
        wide = console.width >= WIDE
        percent = TextColumn("{task.percentage:.0f}%")
        columns = (*named, details, TimeElapsedColumn(), *left) if wide else (percent, details, *left)
        self._live = console.is_terminal
        self._progress = Progress(
            *columns, console=console, refresh_per_second=4, transient=transient, disable=not self._live
        )
        self._task = self._progress.add_task(name, total=total, completed=start, details="")

    def show(self, done: int, details: str) -> None:
        """`done` of `total` units, and the details to print with it."""
        self._progress.update(self._task, completed=done, details=details)
        now = time.monotonic()
        is_last = done == self._total and not self._transient
        if self._live or done == self._printed or (now - self._plain_at < PLAIN_EVERY_S and not is_last):
            return
        self._plain_at, self._printed = now, done
        rate = (done - self._start) / max(now - self._started, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - done) / rate)) if rate else "-"
        line = f"{self._name}: {self._unit} {done}/{self._total} · {details} · ETA {left}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()


class Display(ProgressDisplay):
    """Progress of one run, in steps."""

    def __init__(self, console: Console, run_name: str, step: int, total_steps: int, steps_per_epoch: int) -> None:
        super().__init__(console, run_name, "step", total_steps, step)
        self._steps_per_epoch = steps_per_epoch

    def update(self, state: RunState) -> None:
        """Speed and data wait are means over the whole run; the loss is the latest logged."""
        loss = "-" if state.loss_last is None else f"{state.loss_last:.4f}"
        epoch, epochs = state.step / self._steps_per_epoch, self._total / self._steps_per_epoch
        speed, wait = state.images / state.train_s, 100 * state.wait_s / state.train_s
        details = f"epoch {epoch:.1f}/{epochs:.4g} · loss {loss} · {speed:.0f} images/s · data wait {wait:.0f}%"
        if state.store_wait_s:
            details += f" · store wait {100 * state.store_wait_s / state.train_s:.0f}%"
        if state.bad_samples:
            details += f" · {state.bad_samples} bad samples replaced"
        if state.skipped_steps:
            details += f" · {state.skipped_steps} steps skipped"
        if state.collapsed:
            details += " · COLLAPSE ALARM"
        self.show(state.step, details)


KNN_NAMES = {
    "pixels": "k-NN, raw pixels",
    "colour_histogram": "k-NN, colour histogram",
    "random_init": "k-NN, random initialisation",
    "trained": "k-NN, trained encoder",
}


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of `summary`, the content of summary.json, as they are shown."""
    rows = [
        ("images seen", f"{summary['images']:,}"),
        ("images/s", f"{summary['images_per_s']:.0f}"),
        ("data wait", f"{summary['data_wait_percent']:.1f} %"),
    ]
    if summary.get("store_wait_percent") is not None:
        rows.append(("of it for the store", f"{summary['store_wait_percent']:.1f} %"))
    if summary["loss_first"] is not None:
        rows.append(("loss, first -> last", f"{summary['loss_first']:.4f} -> {summary['loss_last']:.4f}"))
    if summary["bad_samples"]:
        rows.append(("bad samples, replaced", f"{summary['bad_samples']:,}, see quarantine.jsonl"))
    if summary["skipped_steps"]:
        rows.append(("steps skipped, not finite", f"{summary['skipped_steps']:,}"))
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
