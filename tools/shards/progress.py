"""Progress of a conversion."""

import time

from rich.console import Console

from train.output.display import ProgressDisplay

MB = 1e6


class ShardProgress(ProgressDisplay):
    """Images, bytes and rejects of a run over `num_images`, on stderr. Call `update` with totals so far."""

    def __init__(self, what: str, num_images: int) -> None:
        super().__init__(Console(stderr=True), what, "image", num_images, transient=True)

    def update(self, images: int, num_bytes: int, rejects: int) -> None:
        passed = max(time.monotonic() - self._started, 1e-6)
        speed = f"{images / passed:,.0f} images/s · {num_bytes / MB / passed:,.0f} MB/s"
        self.show(images, f"{speed} · {rejects} rejected")
