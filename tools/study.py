"""The study: do crops, strategies, hierarchy and loss terms pay? `python tools/study.py CONFIG --out results [--budget S]`.

Every variant is trained for the same CPU time (all threads of its process, calibrated in steps first, so that the schedule ends
where the time does), or on as many images as the base variant; then its frozen encoder is measured. It writes OUT/NAME.csv (a
line for each training), NAME.md (the tables) and NAME.png. Run again, it continues where it stopped and rewrites the tables.

With --peers or --variants it is an arena instead: ours beside other methods (lejepa, ijepa, dino, supervised) or variants of
ours, at equal CPU time and at equal images, measured along the way. It writes NAME_arena.csv, .md and .png, and
NAME_arena_curve.csv, a line for each measurement.
"""

import argparse
import csv
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.studies.calibration import apart, calibrate
from tools.studies.grid import BASE, IMAGES, PEERS, TIME, VARIANTS, Base, Trial, arena_trials, check_installed, trials
from train.command import run_command
from train.config.load import load_config

FIELDS = (
    "variant", "equal", "seed", "knn", "linear", "rankme", "steps", "images", "cpu_s", "wall_s", "images_per_cpu_s",
    "peak_mib", "step_mib",
)  # fmt: skip
CURVE_FIELDS = ("variant", "equal", "seed", "steps", "images", "cpu_s", "knn", "linear", "rankme")
ARENA_POINTS = 5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path, help="The base variant, the YAML file of a run.")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Settings that replace those of the file, for all variants."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="The folder of the tables. The default is %(default)s."
    )
    parser.add_argument(
        "--budget", type=float, default=60.0, metavar="S", help="CPU seconds of a training. The default is %(default)s."
    )
    parser.add_argument(
        "--seeds",
        default="0,1,2",
        help="Seeds of the crops at equal time, or of the arena. The default is %(default)s.",
    )
    parser.add_argument(
        "--other-seeds", default="0,1,2", help="Seeds of all else in the study. The default is %(default)s."
    )
    parser.add_argument("--peers", action="store_true", help=f"Compare with {', '.join(PEERS)}: the arena.")
    parser.add_argument("--variants", default="", metavar="A,B", help="Compare with these: the arena.")
    parser.add_argument(
        "--equal", choices=(TIME, IMAGES), help="What the arena keeps equal. By default first one, then the other."
    )
    parser.add_argument(
        "--points",
        type=int,
        metavar="N",
        help=f"How often the arena measures a training, evenly spaced. The default is {ARENA_POINTS}.",
    )
    return parser.parse_args(arguments)


def parse_seeds(option: str, text: str) -> list[int]:
    """`0,1,2` or nothing. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"{option} {text}: write different integers >= 0 with commas between them, such as 0,1,2")
    return [int(part) for part in parts]


def arena_variants(given: argparse.Namespace) -> list[str]:
    """What the arena compares, the base first; empty for the study. Raises ValueError."""
    named = [name.strip() for name in given.variants.split(",")] if given.variants else []
    if unknown := [name for name in named if name not in VARIANTS | PEERS]:
        raise ValueError(f"--variants {', '.join(unknown)}: unknown; known are {', '.join(VARIANTS | PEERS)}")
    chosen = [*(PEERS if given.peers else ()), *named]
    return list(dict.fromkeys([BASE, *chosen])) if chosen else []


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Raises ValueError for a table without these columns in its first line, to which nothing should be added."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(fields) - set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}: its first line lacks the columns {', '.join(sorted(missing))}. Move it away, or choose another --out"
            )
        return list(reader)


def append_rows(path: Path, fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(rows)


class Study:
    """The files of one study or arena, and what is to be trained. Raises ValueError for options that make no sense."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.variants = arena_variants(given)
        check_installed(self.variants)
        self.points = given.points or (ARENA_POINTS if self.variants else 1)
        for wrong, reason in (
            (given.budget <= 0, f"--budget {given.budget:g}: must be more than 0 seconds"),
            (given.points is not None and given.points < 1, f"--points {given.points}: must be at least 1"),
            (
                (given.points or given.equal) and not self.variants,
                "--points, --equal: are for the arena; add --peers or --variants",
            ),
        ):
            if wrong:
                raise ValueError(reason)
        self.given, self.base = given, Base(str(given.config), tuple(given.overrides))
        self.seeds, others = (
            parse_seeds(f"--{o.replace('_', '-')}", getattr(given, o)) for o in ("seeds", "other_seeds")
        )
        equals = (given.equal,) if given.equal else (TIME, IMAGES)
        self.planned = arena_trials(self.variants, self.seeds, equals) if self.variants else trials(self.seeds, others)
        run_name = load_config(given.config, given.overrides).logging.run_name
        self.name = f"{run_name}_arena" if self.variants else run_name
        self.table, self.curve = (given.out / f"{self.name}{end}.csv" for end in ("", "_curve"))
        self.steps: dict[str, int] = {}

    def calibrate(self) -> None:
        path = self.given.out / f"{self.name}_calibration.json"
        variants = list(dict.fromkeys([BASE, *(trial.variant for trial in self.planned)]))
        self.steps = calibrate(path, self.base, self.given.budget, self.points, variants)

    def add(self, trial: Trial, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the measurements of a training, of which the last counts; its line in the table is written last."""
        named = [{"variant": trial.variant, "equal": trial.equal, "seed": trial.seed, **row} for row in rows]
        if self.variants:
            append_rows(self.curve, CURVE_FIELDS, named)
        append_rows(self.table, FIELDS, named[-1:])

    def write(self) -> None:
        """The tables and plots of all that is done, by an earlier call with other variants too."""
        rows = read_rows(self.table, FIELDS)
        if not self.variants:
            from tools.studies.table import write_tables

            write_tables(self.given.out, self.name, rows, self.steps, self.given.budget)
            return
        from tools.studies.arena import write_arena

        shown = list(dict.fromkeys([*self.variants, *(row["variant"] for row in rows if row["equal"])]))
        # A training that was stopped between its two files has its measurements twice.
        points = {tuple(row[key] for key in CURVE_FIELDS[:4]): row for row in read_rows(self.curve, CURVE_FIELDS)}
        command = shlex.join(
            ["python", "tools/study.py", self.base.config, *self.base.overrides, "--variants", ",".join(shown[1:])]
        )
        command += f" --budget {self.given.budget:g} --points {self.points}"
        command += f" --equal {self.given.equal}" if self.given.equal else ""
        write_arena(
            self.given.out, self.name, command, shown, rows, list(points.values()), self.steps, self.given.budget
        )


def run_study(given: argparse.Namespace) -> None:
    study = Study(given)
    given.out.mkdir(parents=True, exist_ok=True)
    study.calibrate()
    from tools.studies.run import run_baselines, run_trial

    done = {(row["variant"], row["equal"], int(row["seed"])) for row in read_rows(study.table, FIELDS)}
    for seed in study.seeds:
        if ("raw pixels", "", seed) not in done:
            for variant, figures in apart(run_baselines, study.base, seed).items():
                append_rows(study.table, FIELDS, [{"variant": variant, "equal": "", "seed": seed, **figures}])
    study.write()
    wanted = [t for t in study.planned if (t.variant, t.equal, t.seed) not in done]
    for number, trial in enumerate(wanted, 1):
        started = time.monotonic()
        count = study.steps[trial.variant if trial.equal == TIME else BASE]
        rows = apart(run_trial, study.base, trial.variant, trial.seed, count, study.points)
        study.add(trial, rows)
        study.write()
        last = rows[-1]
        print(
            f"{study.name} {number}/{len(wanted)}: {trial.variant}, equal {trial.equal}, seed {trial.seed}: k-NN {last['knn']}, "
            f"linear {last['linear']}, {last['cpu_s']} CPU s, {time.monotonic() - started:.0f} s", flush=True,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(
        "study", lambda: run_study(parse_arguments(arguments)), "interrupted; the same command continues"
    )


if __name__ == "__main__":
    sys.exit(main())
