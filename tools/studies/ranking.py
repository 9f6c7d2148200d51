"""Do scores without labels rank encoders as labels do? `python -m tools.studies.ranking TABLE [TABLE ...] --out OUT`.

A TABLE is a CSV file of the study or the arena, or any with those columns. Its column `data`, or else its name, is the data set's
name. OUT.md gets Spearman's rank correlation of placement, and of RankMe, with each score; OUT.png shows the points of placement.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy import stats

from pipeline.text import markdown_table
from tools.studies.tables import BASELINES
from train.command import path_argument, run_command

mpl.use("agg")

from matplotlib import pyplot as plt

LABEL_FREE, LABELLED = ("placement", "rankme"), ("knn", "linear", "dense_knn", "dense_linear")
RESAMPLES, MIN_ROWS = 2000, 5


def read_groups(rows: Sequence[dict[str, str]], measure: str, score: str) -> dict[str, np.ndarray]:
    """Return by data set `[n, 2] float64`, both scores of the encoders that have them, where there are MIN_ROWS."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["variant"] not in (*BASELINES, "supervised") and row.get(measure) and row.get(score):
            groups.setdefault(row["data"], []).append((float(row[measure]), float(row[score])))
    return {data: np.array(pairs) for data, pairs in groups.items() if len(pairs) >= MIN_ROWS}


def correlation(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return Spearman's rho of pairs `[..., n, 2]`; of several groups, that of the ranks within each, from -1/2 to 1/2."""
    ranks = [(stats.rankdata(group, axis=-2) - 0.5) / group.shape[-2] - 0.5 for group in groups]
    x, y = np.moveaxis(np.concatenate(ranks, axis=-2), -1, 0)
    return (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)).clip(1e-12)


def interval(groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the 95% interval of `correlation` over resampled encoders of each group (percentile bootstrap)."""
    rng = np.random.default_rng(0)
    drawn = correlation([group[rng.integers(0, len(group), (RESAMPLES, len(group)))] for group in groups])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def rank(tables: Sequence[Path], out: Path) -> str:
    """Write OUT.md and OUT.png, and return the table. Raises ValueError without enough rows."""
    rows: list[dict[str, str]] = []
    for path in tables:
        with path.open(newline="") as file:
            rows += [{"data": path.stem, **row} for row in csv.DictReader(file)]
    lines = []
    for score, measure in ((score, measure) for score in LABELLED for measure in LABEL_FREE):
        groups = read_groups(rows, measure, score)
        pooled = {"all, ranked within each": list(groups.values())} if len(groups) > 1 else {}
        for data, parts in {**{data: [pairs] for data, pairs in groups.items()}, **pooled}.items():
            low, high = interval(parts)
            rho, count = correlation(parts), sum(map(len, parts))
            lines.append((score, measure, data, f"{count}", f"{rho:.2f}", f"{low:.2f} to {high:.2f}"))
    panels = {score: groups for score in LABELLED if (groups := read_groups(rows, "placement", score))}
    if not panels:
        raise ValueError(f"no data set has {MIN_ROWS} trained encoders with placement and a score with labels")
    text = markdown_table(("with labels", "without", "data", "encoders", "Spearman's rho", "95% interval"), lines)
    command = f"`python -m tools.studies.ranking {' '.join(map(str, tables))} --out {out}`"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"## {out.stem}\n\n{command}\n\n{text}\n")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, (name, groups) in zip(axes[0], panels.items(), strict=True):
        for data, pairs in groups.items():
            axis.plot(*pairs.T, "o", alpha=0.8, label=f"{data}, rho {correlation([pairs]):.2f}")
        axis.set(xlabel="placement accuracy, %", ylabel=f"{name}, %")
        axis.legend(fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=110)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=path_argument, metavar="TABLE", help="Rows of trained encoders.")
    parser.add_argument("--out", type=path_argument, default=Path("results/placement"), help="The default is %(default)s.")
    args = parser.parse_args(arguments)
    return run_command("ranking", lambda: print(rank(args.tables, args.out)))


if __name__ == "__main__":
    sys.exit(main())
