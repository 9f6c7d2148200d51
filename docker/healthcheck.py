"""Check that the training in this container makes progress, by the age of the heartbeat file that it writes every few seconds.

The exit code is 1 after HEARTBEAT_MAX_AGE_S seconds without progress, and otherwise 0, also where nothing trains: during a
conversion or a start, for tensorboard, and on machines without rank 0. Uses only the standard library.
"""

import json
import os
import sys
import time
from pathlib import Path

MAX_AGE_S = float(os.environ.get("HEARTBEAT_MAX_AGE_S", "900"))  # the default of training.timeout_s, after which ranks give up
# A run that is evaluating or has ended writes no more heartbeats.
BEATING = "training"


def main(runs: Path, processes: Path = Path("/proc")) -> int:
    beats = [beat for path in runs.glob("*/heartbeat.json") if (beat := read(path)) and is_ours(beat, processes)]
    newest = max(beats, key=lambda beat: beat["time"], default=None)
    if newest is None or newest["status"] != BEATING:
        print("nothing trains here")
        return 0
    age = time.time() - newest["time"]
    print(f"step {newest['step']} of {newest['total_steps']}, {age:.0f} s ago")
    return int(age > MAX_AGE_S)


def read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def is_ours(beat: dict, processes: Path) -> bool:
    """Return True if the process of a heartbeat runs here: run folders are shared, and stopped runs leave the file behind."""
    try:
        return b"train.run" in (processes / str(beat["pid"]) / "cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs")))
