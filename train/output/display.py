"""Progress of a command, as a live bar in a terminal and as plain lines elsewhere."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from pipeline.text import plural
from train.state import RunState

PLAIN_EVERY_S = 5.0
LOADING = "loading torch, DALI and timm ..."  # ten seconds of imports, which would look like a hang
MIN_WIDTH_FOR_BAR = 132  # columns of a terminal that has room for more than steps, details and ETA


class ProgressDisplay:
    """Progress of a command. Use it as a context and call `show` as often as you like: it draws a few times a second.

    A `transient` display clears its bar at the end, and short work leaves no plain line at all.
    """

    def __init__(self, console: Console, name: str, unit: str, total: int, start: int = 0, transient: bool = False) -> None:
        self._console, self._unit, self._total, self._transient = console, unit, total, transient
        self._plain_at, self._printed = time.monotonic() if transient else 0.0, start
        # Where space is short, the details are cut: steps and ETA always show.
        details = TextColumn("{task.fields[details]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns: list[ProgressColumn] = [MofNCompleteColumn(), details, TextColumn("ETA"), TimeRemainingColumn()]
        if console.width >= MIN_WIDTH_FOR_BAR:
            columns = [TextColumn("[bold]{task.description}"), BarColumn(), *columns]
        settings: dict[str, Any] = {"refresh_per_second": 4, "transient": transient, "disable": not console.is_terminal}
        self._progress = Progress(*columns, console=console, expand=True, **settings)
        self._task = self._progress.add_task(name, total=total, completed=start, details="")

    def show(self, done: int, details: str) -> None:
        """Show that `done` of `total` units are complete, with `details`."""
        self._progress.update(self._task, completed=done, details=details)
        if self._console.is_terminal or done == self._printed:
            return
        now, is_last = time.monotonic(), done == self._total and not self._transient
        if is_last or now - self._plain_at >= PLAIN_EVERY_S:
            self._plain_at, self._printed = now, done
            task = self._progress.tasks[0]
            line = f"{task.description}: {self._unit} {done}/{self._total} · {details} · ETA {TimeRemainingColumn().render(task)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class Display(ProgressDisplay):
    """Progress of one run, in steps."""

    def __init__(self, console: Console, run_name: str, step: int, total_steps: int, steps_per_epoch: int) -> None:
        super().__init__(console, run_name, "step", total_steps, step)
        self._steps_per_epoch = steps_per_epoch

    def update(self, state: RunState) -> None:
        """Show the latest logged loss, and speed and data wait averaged over the run."""
        loss = "-" if state.loss_last is None else f"{state.loss_last:.4f} (step {state.loss_step})"
        epoch, epochs = state.step / self._steps_per_epoch, self._total / self._steps_per_epoch
        # Narrow terminals cut the end off, so warnings come first and the epoch, which the step implies, last.
        parts = [
            state.collapsed and "COLLAPSE ALARM",
            state.skipped_steps and plural(state.skipped_steps, "step") + " skipped",
            state.bad_samples and plural(state.bad_samples, "bad sample") + " replaced",
            f"loss {loss}",
            f"{state.images / state.train_s:.0f} images/s",
            f"data wait {100 * state.wait_s / state.train_s:.0f}%",
            epochs >= 1 and f"epoch {epoch:.1f}/{epochs:.4g}",
        ]
        self.show(state.step, " · ".join(part for part in parts if part))
