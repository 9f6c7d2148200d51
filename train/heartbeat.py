"""A small file that says how a run is doing, for scripts that watch or requeue it."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from train.state import RunState

EVERY_S = 5.0


class Heartbeat:
    """`heartbeat.json`: `{status, step, total_steps, time, pid}`, replaced whole; `time` is seconds since 1970.

    Statuses: training, evaluating and, at the end, complete, stopped (run it again), diverged or failed.
    """

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._path, self._total, self._at = folder / "heartbeat.json", total_steps, 0.0

    def beat(self, state: RunState) -> None:
        """Every few seconds, however often it is called."""
        if time.monotonic() - self._at >= EVERY_S:
            self.write("training", state)

    def write(self, status: str, state: RunState) -> None:
        self._at = time.monotonic()
        line = {
            "status": status,
            "step": state.step,
            "total_steps": self._total,
            "time": round(time.time(), 1),
            "pid": os.getpid(),
        }
        temporary = self._path.with_suffix(".partial")
        with suppress(OSError):  # a full disk is told where it costs a checkpoint
            temporary.write_text(json.dumps(line) + "\n")
            temporary.replace(self._path)
