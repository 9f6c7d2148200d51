"""Progress of a long command: a live bar on a terminal, plain lines elsewhere."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.notices import Every

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 5.0


class ShardProgress(Progress):
    """Images, bytes and rejects of a run over `num_images`, on stderr. Call `show` with the totals so far."""

    def __init__(self, name: str, num_images: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rates]}"))
        super().__init__(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        self._bar = self.add_task(name, total=num_images, rates="")
        self._name, self._num_images = name, num_images
        self._start, self._plain_line = time.monotonic(), Every(PLAIN_LINE_EVERY_S)

    def show(self, images: int, num_bytes: int, rejects: int) -> None:
        elapsed = max(time.monotonic() - self._start, 1e-6)
        rates = (
            f"{images:,} of {self._num_images:,} images, {images / elapsed:,.0f} img/s, "
            f"{num_bytes / 1e6 / elapsed:,.0f} MB/s, {rejects} rejected"
        )
        self.update(self._bar, completed=images, rates=rates)
        if self.disable and self._plain_line.due():
            left = elapsed * (self._num_images - images) / max(images, 1)
            log.info("%s: %s, %.0f s left", self._name, rates, left)
