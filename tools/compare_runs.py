"""Curves of several runs together: `python tools/compare_runs.py RUN [RUN ...] [--out PNG]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

from train.output.log import read_metrics

PANELS = (
    ("loss", "loss"), ("prediction, finest level", "level_0"), ("view term", "view"), ("SIGReg", "sigreg"),
    ("RankMe of pooled features", "rankme"), ("k-NN during the run, %", "knn"), ("linear probe during the run, %", "linear"),
    ("images/s", "images_per_s"),
)  # fmt: skip


def read_runs(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Logged lines by the run's name, or its path where two have the same. ValueError for a folder that logged nothing."""
    runs = {}
    for folder in folders:
        lines = read_metrics(folder)
        if not lines:
            raise ValueError(
                f"{folder}: no metrics.jsonl with a line in it; give the folders of runs, such as runs/quickstart"
            )
        runs[folder.name if folder.name not in runs else str(folder)] = lines
    return runs


def draw_runs(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """One panel for each figure that any of the runs has logged, one colour for each run."""
    panels = [(title, key) for title, key in PANELS if any(key in line for lines in runs.values() for line in lines)]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.9 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, (title, key) in zip(axes.flat, panels, strict=False):
        for number, (name, lines) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in lines if key in line]
            marker = "o" if len(points) < 12 else None  # a few measurements, or one, would not show as a line
            axis.plot(*zip(*points, strict=True) if points else ([], []), color=f"C{number}", label=name, linewidth=1.2,
                      marker=marker, markersize=4)  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(runs)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), metavar="PNG", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        draw_runs(given.out, read_runs(given.runs))
    except (ValueError, OSError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    print(f"drawn in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
