"""Does continuing from weights pay? `python -m tools.studies.continuing runs/google:shards/twitter ... --out results`.

Each pair names a run of `configs/study_emoji.yaml model.encoder_kwargs.depth=4` on one data set and the shards of another. Its
encoder is continued there with the recipe of configs/continue.yaml, and compared with training from nothing at equal CPU time
(calibrated in steps), the untouched weights, the random initialisation and raw pixels. All mixtures with the start are
measured, and what could choose one of them. The study writes OUT/continuing.csv, a line for each mixture, and continuing.md.
Run again, it continues where it stopped. `--variants` varies what learns, how fast, the anchor and the losses.
"""

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tools.own_process import run_in_subprocess
from tools.studies.grid import BASE, Base
from tools.study import append_rows, parse_seeds
from train.command import CommandParser, path_argument, run_command
from train.config.load import read_values

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = ("training.epochs", "training.max_steps")  # the budget decides
SMALL = ("model.encoder_kwargs.depth=4", "data.multicrop.num_local_crops=4", "evaluation.max_samples=3000")
PIXELS, UNTOUCHED, SCRATCH, RECIPE = "raw pixels", "untouched", "from nothing", "recipe"
ALL_BLOCKS, NO_ANCHOR, NO_SUMMARY = "training.train_blocks=all", "loss.anchor_weight=0.0", "loss.summary_weight=0.0"
MASKED = ("masking.strategy=global_only", "masking.context_ratio=0.5", "masking.query_ratio=0.5", "loss.prediction_weight=1.0")
# Settings besides those of configs/continue.yaml.
VARIANTS: dict[str, tuple[str, ...]] = {
    RECIPE: (),
    "no anchor": (NO_ANCHOR,),
    "last block": ("training.train_blocks=last_1",),
    "EMA 0.999": ("training.ema_momentum=0.999", "training.ema_final_momentum=0.999"),
    "all blocks at lr/5": (ALL_BLOCKS, "training.lr=2e-5", NO_ANCHOR),
    "all blocks at lr/5 + anchor": (ALL_BLOCKS, "training.lr=2e-5"),
    "all blocks at lr 1e-3": (ALL_BLOCKS, "training.lr=1e-3", NO_ANCHOR),
    "views": (NO_SUMMARY,),
    "masked prediction": (*MASKED, NO_SUMMARY, "loss.view_weight=0.0", "loss.sigreg_weight=0.0"),
    "views + masked prediction": (*MASKED, NO_SUMMARY),
}
FIELDS = (
    "weights", "data", "variant", "seed", "share", "chosen", "knn", "linear", "rankme", "knn_train", "uniformity", "cosine",
    "knn_first", "steps", "cpu_s",
)  # fmt: skip
COLUMNS = {
    "k-NN %": "knn", "linear %": "linear", "k-NN % on the first set": "knn_first", "RankMe": "rankme", "uniformity": "uniformity",
    "cosine to the start": "cosine", "CPU s": "cpu_s", "share": "share",
}  # fmt: skip
Row = dict[str, str]
# Rules that choose one mixture of a training; its mixtures are sorted by share.
CHOSEN = "k-NN among the training images, two standard errors above the start, as shipped"
CHOICES: dict[str, Callable[[Sequence[Row]], Row]] = {
    CHOSEN: lambda rows: next((row for row in rows if float(row["chosen"] or 0)), rows[-1]),
    "k-NN among the training images, the highest": lambda rows: max(rows, key=lambda row: float(row["knn_train"] or 0)),
    "RankMe, the highest": lambda rows: max(rows, key=lambda row: float(row["rankme"])),
    "uniformity, the lowest": lambda rows: min(rows, key=lambda row: float(row["uniformity"])),
    "the largest share with a cosine of 0.9": lambda rows: [row for row in rows if float(row["cosine"]) >= 0.9][-1],
    "always 1/2": lambda rows: rows[len(rows) // 2],
    "always 1": lambda rows: rows[-1],
    "the validation labels, which is no fair score": lambda rows: max(rows, key=lambda row: float(row["knn"])),
}


class Trial(NamedTuple):
    """One training. `weights` is "" for what needs none, and is then the same for all pairs with the data."""

    weights: str
    data: str
    variant: str
    seed: int


@dataclass(frozen=True)
class Pair(Base):
    weights: str = ""
    data: str = ""

    def settings(self, variant: str) -> tuple[str, ...]:
        """Return those of configs/study_emoji.yaml for data and encoder and, but for the base, the recipe for the rest."""
        given = [f"data.data_path={self.data}", *self.overrides]
        if variant != BASE:
            given = [*recipe(), f"model.weights={self.weights}", *VARIANTS[variant], *given]
        return tuple({setting.partition("=")[0]: setting for setting in given}.values())


@cache
def recipe() -> tuple[str, ...]:
    values = read_values(CONFIGS / "continue.yaml", {})
    parts = ("masking", "loss", "training")
    found = {f"{part}.{key}": value for part in parts for key, value in values[part].items()}
    return tuple(f"{key}={json.dumps(value)}" for key, value in found.items() if key not in STEPS)


def run_trial(pair: Pair, trial: Trial, steps: int) -> list[dict[str, Any]]:
    """Train, and return a row of figures for each mixture with the start; training from nothing has one."""
    from torch.nn import functional as F

    from tools.studies.training import CPU, TimedTraining, trial_config
    from train.adapt.mix import SHARES, best_share, mixed, uniformity
    from train.adapt.weights import starting_encoder
    from train.build import build_evaluation_loaders
    from train.evaluation.features import pooled_features
    from train.evaluation.measure import leave_one_out_hits, measure
    from train.evaluation.offline import find_checkpoint

    config = trial_config(pair, BASE if trial.variant == SCRATCH else trial.variant, trial.seed, steps)
    training, k = TimedTraining(config, trial.variant), config.evaluation.knn_k
    training.run_to(steps)
    target, start = training.trainer.model.eval().target, training.trainer.start
    encoders, loaders = {1.0: target}, {"": build_evaluation_loaders(config)}
    if start is not None:
        untouched = starting_encoder(config, CPU, start)
        encoders = {share: mixed(untouched, target, share).eval() for share in SHARES}
        first = Pair(pair.config, pair.overrides, data=find_checkpoint(Path(pair.weights))[1].data.data_path)
        loaders["first"] = build_evaluation_loaders(trial_config(first, BASE, 0, 1))
    extractors = {str(share): pooled_features(encoder) for share, encoder in encoders.items()}
    scores = measure(loaders[""], extractors, CPU, ks=[k], linear_epochs=config.evaluation.linear_epochs, with_rankme=True)
    there = measure(loaders["first"], extractors, CPU, ks=[k]) if start is not None else {}
    hits = {float(share): leave_one_out_hits(score.train, k, CPU) for share, score in scores.items()}
    chosen = best_share(hits) if start is not None else 1.0
    rows, begin = [], next(iter(scores.values())).test.values["last"].float()
    for share, score in scores.items():
        values = score.test.values["last"].float()
        figures = {
            "knn": score.knn["last"][k], "linear": score.linear[0] if score.linear else 0.0, "rankme": score.rankme or 0.0,
            "knn_train": 100 * float(hits[float(share)].double().mean()), "uniformity": uniformity(score.train.values["last"]),
            "cosine": float(F.cosine_similarity(values, begin).mean()), "steps": float(steps), "cpu_s": training.cpu_s,
        }  # fmt: skip
        figures |= {"knn_first": there[share].knn["last"][k]} if there else {}
        figures["chosen"] = float(float(share) == chosen)
        rows.append({**trial._asdict(), "share": share, **{name: f"{value:.4g}" for name, value in figures.items()}})
    return rows


def run_study(options: argparse.Namespace) -> None:
    seeds, variants = parse_seeds(options.seeds), options.variants.split(",")
    if unknown := set(variants) - {SCRATCH, *VARIANTS}:
        raise ValueError(f"--variants {', '.join(sorted(unknown))}: unknown; known are {', '.join((SCRATCH, *VARIANTS))}")
    parts = (text.partition(":") for text in options.pairs)
    base = str(CONFIGS / "study_emoji.yaml"), (*SMALL, *options.set)
    pairs = [Pair(*base, weights=weights, data=data) for weights, _, data in parts]
    if wrong := [pair for pair in pairs if not (Path(pair.weights).is_dir() and Path(pair.data or "-").is_dir())]:
        raise ValueError(f"{wrong[0].weights}:{wrong[0].data}: no such folders; write RUN:SHARDS")
    path, table = options.out / "continuing", options.out / "continuing.csv"
    options.out.mkdir(parents=True, exist_ok=True)
    from tools.studies.training import calibrate, run_baselines

    names = [BASE if name == SCRATCH else name for name in variants]
    steps = calibrate(options.out / "continuing_calibration.json", pairs[0], options.budget, 1, names)
    for seed in seeds:
        for pair in pairs:
            if Trial("", pair.data, PIXELS, seed) not in read_table(table):
                for name, found in run_in_subprocess(run_baselines, pair, seed).items():
                    append_rows(table, FIELDS, [{**Trial("", pair.data, name, seed)._asdict(), **found}])
            for name in variants:
                trial = Trial("" if name == SCRATCH else pair.weights, pair.data, name, seed)
                if trial not in read_table(table):
                    rows = run_in_subprocess(run_trial, pair, trial, steps[BASE if name == SCRATCH else name])
                    append_rows(table, FIELDS, rows)
                    print(f"{path.name}: {trial}: k-NN {', '.join(row['knn'] for row in rows)}", flush=True)
                    write_study(options, path, steps)
    write_study(options, path, steps)


def read_table(path: Path) -> dict[Trial, list[Row]]:
    trials: dict[Trial, list[Row]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                trials.setdefault(Trial(row["weights"], row["data"], row["variant"], int(row["seed"])), []).append(row)
    return trials


def write_study(options: argparse.Namespace, path: Path, steps: dict[str, int]) -> None:
    """Write PATH.md: a table for each pair, also of earlier calls, and one of what other choices of the share give."""
    from tools.studies.tables import BASELINES, format_cell, markdown

    trials = read_table(path.with_name(f"{path.name}.csv"))
    pairs = dict.fromkeys((trial.weights, trial.data) for trial in trials if trial.weights)
    words = ["python", "-m", "tools.studies.continuing", *map(":".join, pairs), "--budget", f"{options.budget:g}"]
    words += ["--variants", ",".join(name for name in (SCRATCH, *VARIANTS) if any(name == trial.variant for trial in trials))]
    words += ["--set", *options.set] if options.set else []
    counts = ", ".join(f"{SCRATCH if name == BASE else name}: {count:,}" for name, count in steps.items())
    text = [f"## {path.name}", "", (
        f"`{shlex.join(words)}`; on a CPU, one thread for torch. Equal CPU time: {options.budget:g} CPU seconds of training, "
        f"calibrated in steps ({counts}); evaluations do not count. One run on the first set for all seeds. The share of the "
        "trained encoder in a mixture is chosen by k-NN among the training images, each left out, and is 0 where it gains less "
        "than two standard errors; the scores are of the validation images. Mean over seeds ± half of the 95% interval "
        "(Student's t); leads are of k-NN at the same seed, in points."
    ), ""]  # fmt: skip
    for weights, data in pairs:
        lines: dict[str, dict[int, Row]] = {name: {} for name in (*BASELINES, UNTOUCHED, SCRATCH)}
        for trial, rows in trials.items():
            if trial.data == data and trial.weights in ("", weights):
                lines.setdefault(trial.variant, {})[trial.seed] = CHOICES[CHOSEN](rows)
                if trial.weights:
                    lines[UNTOUCHED][trial.seed] = rows[0]
                    lines.setdefault(f"{trial.variant}, not mixed", {})[trial.seed] = rows[-1]
        cells = []
        for title, seeds in lines.items():
            numbers = ([float(row[field]) for row in seeds.values() if row[field]] for field in COLUMNS.values())
            cells.append([title, str(len(seeds)), *(format_cell(values, ".2f") for values in numbers)])
            for other in (lines[UNTOUCHED], lines[SCRATCH]):
                leads = [float(row["knn"]) - float(other[seed]["knn"]) for seed, row in seeds.items() if seed in other]
                cells[-1].append(format_cell(leads, "+.1f"))
        head = ["", "seeds", *COLUMNS, f"over {UNTOUCHED}", f"over {SCRATCH}"]
        text += markdown(f"{Path(weights).name} to {Path(data).name}", head, [line for line in cells if line[1] != "0"])
    gains = {name: [float(choose(rows)["knn"]) - float(rows[0]["knn"]) for trial, rows in trials.items() if trial.weights]
             for name, choose in CHOICES.items()}  # fmt: skip
    cells = [[name, str(len(all_)), format_cell(all_, "+.2f"), f"{min(all_):+.1f}"] for name, all_ in gains.items() if all_]
    text += markdown(f"k-NN over the {UNTOUCHED} weights, by what chooses the share", ["", "runs", "points", "worst"], cells)
    path.with_name(f"{path.name}.md").write_text("\n".join(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="continuing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pairs", nargs="+", metavar="RUN:SHARDS", help="Folders of a run, and of a data set with train/ and val/.")
    add("--out", type=path_argument, default=Path("results"), help="The folder of the tables (default: %(default)s).")
    names = f"What to train (default: %(default)s); also {', '.join(tuple(VARIANTS)[1:])}."
    add("--variants", default=f"{SCRATCH},{RECIPE}", metavar="A,B", help=names)
    add("--budget", type=float, default=30.0, metavar="S", help="CPU seconds of each training (default: %(default)s).")
    add("--seeds", default="0,1,2", help="Seeds of the trainings (default: %(default)s).")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="Settings of all trainings.")
    return run_command("continuing", lambda: run_study(parser.parse_args(arguments)), "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
