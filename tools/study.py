"""The study: do crops, strategies, hierarchy and loss terms pay? `python tools/study.py CONFIG --out results [--budget S]`.

Every variant is trained for the same CPU time (all threads of its process, calibrated in steps first, so that the schedule ends
where the time does), or on as many images as the base variant; then its frozen encoder is measured. It writes OUT/NAME.csv (a
line for each training), NAME.md (the tables) and NAME.png. Run again, it continues where it stopped and rewrites the tables.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.own_process import own_process
from tools.studies.grid import BASE, TIME, VARIANTS, trials
from train.command import run_command
from train.config.load import load_config

FIELDS = (
    "variant", "equal", "seed", "knn", "linear", "rankme", "steps", "images", "cpu_s", "wall_s", "images_per_cpu_s",
    "peak_mib", "step_mib",
)  # fmt: skip
ROUNDS = 2  # of the calibration; the fastest counts: other load only slows steps down


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path, help="the base variant, a run's YAML file")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=60.0, metavar="S", help="CPU seconds a run; default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the crops at equal time; default: %(default)s")
    parser.add_argument("--other-seeds", type=int, default=3, help="of all else; default: %(default)s")
    return parser.parse_args(arguments)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own; torch is loaded once for all of them."""
    with own_process("tools.studies.run") as worker:
        return worker.submit(function, *arguments).result()


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def calibrate(path: Path, config: Path, budget: float, variants: Sequence[str]) -> dict[str, int]:
    """Steps that fill the budget, by variant, measured once and kept. ValueError if they were measured for another budget."""
    record: dict[str, Any] = {"budget_s": budget, "step_cpu_ms": {}, "steps": {}}
    if path.exists():
        record = json.loads(path.read_text())
    if record["budget_s"] != budget:
        raise ValueError(
            f"{path}: belongs to a study with --budget {record['budget_s']:g}, not {budget:g}; choose another --out"
        )
    missing = [name for name in variants if name not in record["steps"]]
    if not missing:
        return record["steps"]
    from tools.studies.run import step_seconds

    rounds = [{name: apart(step_seconds, str(config), VARIANTS[name]) for name in missing} for _ in range(ROUNDS)]
    for name in missing:
        seconds = min(found[name] for found in rounds)
        record["step_cpu_ms"][name] = round(1000 * seconds, 2)
        record["steps"][name] = max(1, round(budget / seconds))
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record["steps"]


def run_study(given: argparse.Namespace) -> None:
    from tools.studies.run import run_baselines, run_trial
    from tools.studies.table import write_tables

    name = load_config(given.config).logging.run_name
    given.out.mkdir(parents=True, exist_ok=True)
    path, base = given.out / f"{name}.csv", str(given.config)
    planned = trials(given.seeds, given.other_seeds)
    variants = list(dict.fromkeys([BASE, *(trial.variant for trial in planned)]))
    steps = calibrate(given.out / f"{name}_calibration.json", given.config, given.budget, variants)
    done = {(row["variant"], row["equal"], int(row["seed"])) for row in read_rows(path)}
    for seed in range(given.seeds):
        if ("raw pixels", "", seed) not in done:
            for variant, figures in apart(run_baselines, base, seed).items():
                append_row(path, {"variant": variant, "equal": "", "seed": seed, **figures})
    write_tables(given.out, name, read_rows(path), steps, given.budget)
    wanted = [t for t in planned if (t.variant, t.equal, t.seed) not in done]
    for number, trial in enumerate(wanted, 1):
        started = time.monotonic()
        count = steps[trial.variant if trial.equal == TIME else BASE]
        figures = apart(run_trial, base, VARIANTS[trial.variant], trial.seed, count)
        append_row(path, {"variant": trial.variant, "equal": trial.equal, "seed": trial.seed, **figures})
        write_tables(given.out, name, read_rows(path), steps, given.budget)
        print(
            f"{name} {number}/{len(wanted)}: {trial.variant}, equal {trial.equal}, seed {trial.seed}: k-NN {figures['knn']}, "
            f"linear {figures['linear']}, {figures['cpu_s']} CPU s, {time.monotonic() - started:.0f} s", flush=True,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(
        "study", lambda: run_study(parse_arguments(arguments)), "interrupted; the same command continues"
    )


if __name__ == "__main__":
    sys.exit(main())
