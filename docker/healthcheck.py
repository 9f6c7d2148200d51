"""Whether the training in this container makes progress: the age of the heartbeat file that it writes every few seconds.

Exit code 0: it does, or nothing trains here (a conversion, tensorboard, a machine without rank 0, a start). 1: no progress for
HEARTBEAT_MAX_AGE_S seconds. Uses only the standard library.
"""

import json
import os
import sys
import time
from pathlib import Path

MAX_AGE_S = float(os.environ.get("HEARTBEAT_MAX_AGE_S", "900"))  # as training.timeout_s, after which ranks give up
# A run that evaluates or has ended writes no heartbeat.
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
    """Whether its process runs in this container: run folders are shared, and stopped runs leave the file behind."""
    try:
        return b"train.run" in (processes / str(beat["pid"]) / "cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs")))
