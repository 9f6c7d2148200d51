"""How many steps of each variant fill the budget: measured once, side by side, and kept in a file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.own_process import own_process
from tools.studies.grid import BASE, Base
from train.config.changes import changed_settings
from train.config.load import load_config

# What may differ between the calls of one study: where files lie, and what each trial sets itself.
FREE_KEYS = ("device", "seed", "training.max_steps", "training.epochs", "checkpoint.", "logging.", "data.data_path")


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own; torch is loaded once for all of them."""
    with own_process("tools.studies.run") as worker:
        return worker.submit(function, *arguments).result()


def calibrate(path: Path, base: Base, budget: float, points: int, variants: Sequence[str]) -> dict[str, int]:
    """Steps that fill the budget, by variant, measured once and kept. ValueError if they were measured for something else."""
    settings = load_config(Path(base.config), base.overrides).resolved
    made_for = {"budget_s": budget, "points": points, "overrides": list(base.overrides), "settings": settings}
    record: dict[str, Any] = {**made_for, "step_cpu_ms": {}, "steps": {}}
    if path.exists():
        record = made_for | {"points": 1, "overrides": []} | json.loads(path.read_text())
    for key, option in {"budget_s": "--budget", "points": "--points", "overrides": "KEY=VALUE"}.items():
        if record[key] != made_for[key]:
            before, now = (_shown(value) for value in (record[key], made_for[key]))
            raise ValueError(f"{path}: belongs to a study with {option} {before}, not {now}; choose another --out")
    if changes := changed_settings(record["settings"], settings, FREE_KEYS):
        raise ValueError(
            f"{path}: belongs to a study with other settings ({'; '.join(changes)}); choose another --out, or move its files away"
        )
    missing = [name for name in variants if name not in record["steps"]]
    if not missing:
        return record["steps"]
    from tools.studies.run import step_seconds

    found = apart(step_seconds, base, [BASE, *(name for name in missing if name != BASE)], budget)
    known = record["step_cpu_ms"].get(BASE, 1000 * found[BASE])
    for name in missing:
        ms = known * found[name] / found[BASE]
        record["step_cpu_ms"][name] = round(ms, 2)
        record["steps"][name] = max(1, round(1000 * budget / ms))
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record["steps"]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else " ".join(value) or "none"
