"""Do crops, strategies, hierarchy and loss terms pay? `python tools/study.py CONFIG --out results [--budget S]`.

Every variant is trained for the same CPU time (all threads of its process, calibrated in steps first, so that the schedule ends
where the time does) or on as many images as the base variant; then its frozen encoder is measured. The study writes OUT/NAME.csv
(a line for each training), NAME.md (the tables) and NAME.png. Run again, it continues where it stopped and rewrites the tables.

With --peers or --variants it is an arena instead: ours against other methods (lejepa, ijepa, dino, supervised) or variants of
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

from tools.own_process import run_in_subprocess
from tools.studies.grid import BASE, IMAGES, PEERS, TIME, VARIANTS, Base, Trial, arena_trials, check_installed, trials
from train.command import run_command
from train.config.load import load_config

FIELDS = (
    "variant", "equal", "seed", "knn", "linear", "rankme", "steps", "images", "cpu_s", "wall_s", "images_per_cpu_s", "peak_mib",
)  # fmt: skip
CURVE_FIELDS = ("variant", "equal", "seed", "steps", "images", "cpu_s", "knn", "linear", "rankme")
ARENA_POINTS = 5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("config", type=Path, help="The base variant, the YAML file of a run.")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="Settings that replace those of the file, for all variants.")
    add("--out", type=Path, default=Path("results"), help="The folder of the tables. The default is %(default)s.")
    add("--budget", type=float, default=60.0, metavar="S", help="CPU seconds per training. The default is %(default)s.")
    seeds = "0,1,2"
    add("--seeds", default=seeds, help="Seeds of the crops at equal time, or of the arena. The default is %(default)s.")
    add("--other-seeds", default=seeds, help="Seeds of everything else in the study. The default is %(default)s.")
    add("--peers", action="store_true", help=f"Compare with {', '.join(PEERS)}: the arena.")
    add("--variants", default="", metavar="A,B", help="Compare with these: the arena.")
    add("--equal", choices=(TIME, IMAGES), help="What the arena keeps equal. By default first one, then the other.")
    text = f"How often the arena measures a training, evenly spaced. The default is {ARENA_POINTS}."
    add("--points", type=int, metavar="N", help=text)
    return parser.parse_args(arguments)


def parse_seeds(option: str, text: str) -> list[int]:
    """Return the seeds of `0,1,2`, or none. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"{option} {text}: write different integers >= 0 with commas between them, such as 0,1,2")
    return [int(part) for part in parts]


def arena_variants(options: argparse.Namespace) -> list[str]:
    """Return what the arena compares, the base first; nothing for the study. Raises ValueError."""
    named = [name.strip() for name in options.variants.split(",")] if options.variants else []
    if unknown := [name for name in named if name not in VARIANTS | PEERS]:
        raise ValueError(f"--variants {', '.join(unknown)}: unknown; known are {', '.join(VARIANTS | PEERS)}")
    chosen = [*(PEERS if options.peers else ()), *named]
    return list(dict.fromkeys([BASE, *chosen])) if chosen else []


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file. Raises ValueError if its first line lacks one of the columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(fields) - set(reader.fieldnames or ()):
            names = ", ".join(sorted(missing))
            raise ValueError(f"{path}: its first line lacks the columns {names}. Move it away, or choose another --out")
        return list(reader)


def append_rows(path: Path, fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Append to a CSV file, whose columns, if it exists, stay as they are."""
    head = path.read_text().partition("\n")[0] if path.exists() else ""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, head.strip().split(",") if head else fields, restval="", extrasaction="ignore")
        if not head:
            writer.writeheader()
        writer.writerows(rows)


class Study:
    """The files of one study or arena, and its planned trainings. Raises ValueError for options that make no sense."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.base = options, Base(str(options.config), tuple(options.overrides))
        self.variants = arena_variants(options)
        if options.budget <= 0:
            raise ValueError(f"--budget {options.budget:g}: must be more than 0 seconds")
        if options.points is not None and options.points < 1:
            raise ValueError(f"--points {options.points}: must be at least 1")
        if (options.points or options.equal) and not self.variants:
            raise ValueError("--points, --equal: are for the arena; add --peers or --variants")
        self.points = options.points or (ARENA_POINTS if self.variants else 1)
        self.seeds = parse_seeds("--seeds", options.seeds)
        others = parse_seeds("--other-seeds", options.other_seeds)
        equals = (options.equal,) if options.equal else (TIME, IMAGES)
        self.planned = arena_trials(self.variants, self.seeds, equals) if self.variants else trials(self.seeds, others)
        run_name = load_config(options.config, options.overrides).logging.run_name
        self.name = f"{run_name}_arena" if self.variants else run_name
        self.table, self.curve = (options.out / f"{self.name}{end}.csv" for end in ("", "_curve"))
        self.done = {(row["variant"], row["equal"], int(row["seed"])) for row in read_rows(self.table, FIELDS)}
        self.remaining = [trial for trial in self.planned if (trial.variant, trial.equal, trial.seed) not in self.done]
        check_installed({trial.variant for trial in self.remaining})

    def add(self, trial: Trial, rows: Sequence[dict[str, Any]]) -> None:
        """Append the measurements of a training. The last one counts, and its line in the table is written last."""
        named = [{"variant": trial.variant, "equal": trial.equal, "seed": trial.seed, **row} for row in rows]
        if self.variants:
            append_rows(self.curve, CURVE_FIELDS, named)
        append_rows(self.table, FIELDS, named[-1:])

    def write(self, steps: dict[str, int]) -> None:
        """Write the tables and plots of everything that is done, including other variants of an earlier call."""
        from tools.studies.tables import write_arena, write_study

        options, rows = self.options, read_rows(self.table, FIELDS)
        if not self.variants:
            write_study(options.out, self.name, rows, steps, options.budget)
            return
        variants = list(dict.fromkeys([*self.variants, *(row["variant"] for row in rows if row["equal"])]))
        # A training that was stopped between its two files has its measurements twice.
        points = {tuple(row[key] for key in CURVE_FIELDS[:4]): row for row in read_rows(self.curve, CURVE_FIELDS)}
        words = [
            "python",
            "tools/study.py",
            self.base.config,
            *self.base.overrides,
            "--variants",
            ",".join(variants[1:]),
        ]
        words += ["--budget", f"{options.budget:g}", "--points", str(self.points)]
        words += ["--equal", options.equal] if options.equal else []
        path = options.out / self.name
        write_arena(path, shlex.join(words), variants, rows, list(points.values()), steps, options.budget)


def run_study(options: argparse.Namespace) -> None:
    study = Study(options)
    options.out.mkdir(parents=True, exist_ok=True)
    from tools.studies.training import calibrate, run_baselines, run_trial

    path = options.out / f"{study.name}_calibration.json"
    variants = list(dict.fromkeys([BASE, *(trial.variant for trial in study.planned)]))
    steps = calibrate(path, study.base, options.budget, study.points, variants)
    # Baselines first: they take seconds, and the tables are then never without them.
    for seed in study.seeds:
        if ("raw pixels", "", seed) not in study.done:
            baselines = run_in_subprocess(run_baselines, study.base, seed)
            rows = [{"variant": name, "equal": "", "seed": seed, **scores} for name, scores in baselines.items()]
            append_rows(study.table, FIELDS, rows)
    # Write the tables after each training, so that a stopped study shows what is done.
    study.write(steps)
    for number, trial in enumerate(study.remaining, 1):
        started = time.monotonic()
        count = steps[trial.variant if trial.equal == TIME else BASE]
        rows = run_in_subprocess(run_trial, study.base, trial.variant, trial.seed, count, study.points)
        study.add(trial, rows)
        study.write(steps)
        last = rows[-1]
        print(
            f"{study.name} {number}/{len(study.remaining)}: {trial.variant}, equal {trial.equal}, seed {trial.seed}: "
            f"k-NN {last['knn']}, linear {last['linear']}, {last['cpu_s']} CPU s, {time.monotonic() - started:.0f} s",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> None:
        run_study(parse_arguments(arguments))

    return run_command("study", work, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
