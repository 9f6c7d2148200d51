"""Progress of a long command: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.notices import Every

PLAIN_LINE_EVERY_S = 5.0
MB = 1e6


class ShardProgress:
    """Images, bytes and rejects of a run over `num_images`. Call `update` with totals so far."""

    def __init__(self, what: str, num_images: int) -> None:
        self.what, self.num_images = what, num_images
        self.start, self.line = time.monotonic(), Every(PLAIN_LINE_EVERY_S)
        self.figures = ""
        self.live = sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, disable=not self.live, transient=True)
        self.task = self.bar.add_task(what, total=num_images, figures="")

    def update(self, images: int, num_bytes: int, rejects: int) -> None:
        now = time.monotonic()
        passed = max(now - self.start, 1e-6)
        self.figures = (
            f"{images:,} of {self.num_images:,} images, {images / passed:,.0f} img/s, "
            f"{num_bytes / MB / passed:,.0f} MB/s, {rejects} rejected"
        )
        self.bar.update(self.task, completed=images, figures=self.figures)
        if not self.live and self.line.due():
            left = passed * (self.num_images - images) / max(images, 1)
            print(f"{self.what}: {self.figures}, {left:,.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
