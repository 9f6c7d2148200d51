"""Do crops, strategies, hierarchy and loss terms pay? `python tools/study.py CONFIG --out results [--budget S]`.

Every variant is trained for the same CPU time (all threads of its process, calibrated in steps first, so that the schedule ends
where the time does) or on as many images as the base variant; then its frozen encoder is measured. The study writes OUT/NAME.csv
(a line for each training), NAME.md (the tables) and NAME.png. Run again, it continues where it stopped and rewrites the tables.

With --variants it is an arena instead: ours against other methods (lejepa, ijepa, dino, supervised) or variants of ours, at
equal CPU time and at equal images, measured along the way. It writes NAME_arena.csv, .md and .png, and NAME_arena_curve.csv, a
line for each measurement. With --weights RUN, variants such as `continued` start from there: does continuing pay?
"""

import argparse
import csv
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.own_process import run_in_subprocess
from tools.studies.grid import BASE, CONTINUED, CONTINUING, IMAGES, PEERS, TIME, VARIANTS, Base, Trial, plan_sections, plan_trials
from train.command import CommandParser, path_argument, run_command
from train.config.load import load_config

SCORES = ("knn", "linear", "rankme", "placement", "dense_knn", "dense_linear", "share", "unmixed")
CURVE_FIELDS = ("variant", "equal", "seed", *SCORES, "steps", "images", "cpu_s")
FIELDS = (*CURVE_FIELDS, "images_per_cpu_s", "peak_mib")
LATER = {"placement", "dense_knn", "dense_linear", "share", "unmixed"}  # columns that older tables lack
ARENA_POINTS = 5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("config", type=path_argument, help="The base variant, the YAML file of a run.")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="Settings that replace those of the file, for all variants.")
    add("--out", type=path_argument, default=Path("results"), help="The folder of the tables. The default is %(default)s.")
    add("--budget", type=float, default=60.0, metavar="S", help="CPU seconds per training. The default is %(default)s.")
    add("--seeds", default="0,1,2", help="Seeds of the trainings. The default is %(default)s.")
    add("--variants", default="", metavar="A,B", help=f"Compare with these, such as {','.join(PEERS)}: the arena.")
    add("--equal", choices=(TIME, IMAGES), help="What the arena keeps equal. By default first one, then the other.")
    text = f"How often the arena measures a training, evenly spaced. The default is {ARENA_POINTS}."
    add("--points", type=int, metavar="N", help=text)
    add("--lead", default="", metavar="A", help=f"Whose leads to show. The default is {CONTINUED}, or else {BASE}.")
    add("--masks", type=path_argument, metavar="FOLDER", help="Measure the dense probe too, on these images with masks.")
    add("--weights", default="", metavar="W", help="What the variants that continue start from, as model.weights names it.")
    return parser.parse_args(arguments)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `0,1,2`. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--seeds {text}: write different integers >= 0 with commas between them, such as 0,1,2")
    return [int(part) for part in parts]


def arena_variants(options: argparse.Namespace) -> list[str]:
    """Return what the arena compares, the base first; nothing for the study. Raises ValueError."""
    named = [name.strip() for name in options.variants.split(",")] if options.variants else []
    known = VARIANTS | PEERS | (CONTINUING if options.weights else {})
    if unknown := [name for name in named if name not in known]:
        more = "" if options.weights else f"; with --weights {', '.join(CONTINUING)}"
        raise ValueError(f"--variants {', '.join(unknown)}: unknown; known are {', '.join(known)}{more}")
    if options.lead and options.lead not in (BASE, *named):
        raise ValueError(f"--lead {options.lead}: is none of the compared variants, {', '.join((BASE, *named))}")
    return list(dict.fromkeys([BASE, *named])) if named else []


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range, and for options of the arena without one."""
    if options.budget <= 0:
        raise ValueError(f"--budget {options.budget:g}: must be more than 0 seconds")
    if options.points is not None and options.points < 1:
        raise ValueError(f"--points {options.points}: must be at least 1")
    if (options.points or options.equal or options.weights) and not options.variants:
        raise ValueError("--points, --equal, --weights: are for the arena; add --variants")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table. Raises ValueError if its first line lacks one of the columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(FIELDS) - LATER - set(reader.fieldnames or ()):
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


def write_results(options: argparse.Namespace, path: Path, variants: Sequence[str], steps: dict[str, int]) -> None:
    """Write the tables and the plot of everything that is done, including other variants of an earlier call."""
    from tools.studies.tables import write_tables

    rows = read_rows(path.with_name(f"{path.name}.csv"))
    words = ["python", "tools/study.py", str(options.config), *options.overrides, "--budget", f"{options.budget:g}"]
    if variants:
        variants = list(dict.fromkeys([*variants, *(row["variant"] for row in rows if row["equal"])]))
        words += ["--variants", ",".join(variants[1:]), "--points", str(options.points or ARENA_POINTS)]
    for flag in ("equal", "masks", "weights", "lead"):
        words += [f"--{flag}", str(value)] if (value := getattr(options, flag)) else []
    leader = options.lead or (CONTINUED if CONTINUED in variants else BASE)
    write_tables(path, shlex.join(words), variants, leader, rows, steps, options.budget)


def run_study(options: argparse.Namespace) -> None:
    check_options(options)
    masks = str(options.masks) if options.masks else ""
    base, variants = Base(str(options.config), tuple(options.overrides), masks, options.weights), arena_variants(options)
    equals, seeds = (options.equal,) if options.equal else (TIME, IMAGES), parse_seeds(options.seeds)
    planned = plan_trials(plan_sections(variants, equals), seeds)
    run_name = load_config(options.config, options.overrides).logging.run_name
    path = options.out / (f"{run_name}_arena" if variants else run_name)
    table, curve = (path.with_name(f"{path.name}{end}.csv") for end in ("", "_curve"))
    done = {Trial(row["variant"], row["equal"], int(row["seed"])) for row in read_rows(table)}
    remaining = [trial for trial in planned if trial not in done]
    if any(trial.variant == "dino" for trial in remaining) and find_spec("lightly") is None:
        raise ValueError("dino: its loss is lightly's; pip install -e '.[arena]', or name variants without it")
    options.out.mkdir(parents=True, exist_ok=True)
    from tools.studies.training import calibrate, run_baselines, run_trial

    points = (options.points or ARENA_POINTS) if variants else 1
    timed = list(dict.fromkeys([BASE, *(trial.variant for trial in planned)]))
    steps = calibrate(path.with_name(f"{path.name}_calibration.json"), base, options.budget, points, timed)
    # Baselines first: they take seconds, and the tables are then never without them.
    for seed in seeds:
        if Trial("raw pixels", "", seed) not in done:
            baselines = run_in_subprocess(run_baselines, base, seed)
            rows = [{"variant": name, "equal": "", "seed": seed, **scores} for name, scores in baselines.items()]
            append_rows(table, FIELDS, rows)
    # Write the tables after each training, so that a stopped study shows what is done.
    write_results(options, path, variants, steps)
    for number, trial in enumerate(remaining, 1):
        count = steps[trial.variant if trial.equal == TIME else BASE]
        measured = run_in_subprocess(run_trial, base, trial.variant, trial.seed, count, points)
        rows = [{**trial._asdict(), **row} for row in measured]
        if variants:
            append_rows(curve, CURVE_FIELDS, rows)
        append_rows(table, FIELDS, rows[-1:])  # last: a training counts as done when its line is in the table
        write_results(options, path, variants, steps)
        print(
            f"{path.name} {number}/{len(remaining)}: {trial.variant}, equal {trial.equal}, seed {trial.seed}: "
            f"k-NN {rows[-1]['knn']}, linear {rows[-1]['linear']}, {rows[-1]['cpu_s']} CPU s",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> None:
        run_study(parse_arguments(arguments))

    return run_command("study", work, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
