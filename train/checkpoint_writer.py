"""Checkpoints written by a thread while training goes on."""

import threading
from collections.abc import Callable
from pathlib import Path

from train.checkpoint import Snapshot, list_checkpoints, prune_checkpoints, write_checkpoint


class CheckpointWriter:
    """Writes one snapshot at a time to `folder`. A full disk is told through `say`; what was written before stays."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int, say: Callable[[str], None]) -> None:
        self._folder, self._keep_last, self._keep_best, self._say = folder, keep_last, keep_best, say
        self._thread: threading.Thread | None = None
        self.saved_step: int | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Return at once, unless the snapshot before this one is still being written."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,))
        self._thread.start()

    def wait(self) -> None:
        """Until all that was handed over is on the disk, or refused by it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self._folder, snapshot)
            prune_checkpoints(self._folder, self._keep_last, self._keep_best)
            self.saved_step = snapshot.state["step"]
        except OSError as error:
            sound = list_checkpoints(self._folder)
            last = f"the last one is {sound[-1].name}" if sound else "there is none yet"
            self._say(
                f"{self._folder}: step {snapshot.state['step']} could not be saved ({error}); {last}. Training goes on: free "
                "some space, or lower checkpoint.keep_last_n"
            )
