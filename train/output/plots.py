"""Plots of numbers: curves over the steps of runs, and repeated measurements as points."""

from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

Panels = Sequence[tuple[str, tuple[str, ...]]]
"""The title of each panel and the names of the metrics it shows, which may contain `*`."""

RUN_PANELS: Panels = (
    ("loss", ("loss",)), ("prediction, by level", ("level_*", "summary", "inside", "outside")), ("view term", ("view",)),
    ("SIGReg", ("sigreg",)), ("RankMe of pooled features", ("rankme",)), ("images/s", ("images_per_s",)),
    ("data wait, % of the step", ("data_wait_percent", "store_wait_percent")), ("learning rate", ("lr",)),
)  # fmt: skip
COMPARED_PANELS: Panels = (
    ("loss", ("loss",)), ("prediction, finest level", ("level_0",)), ("view term", ("view",)), ("SIGReg", ("sigreg",)),
    ("RankMe of pooled features", ("rankme",)), ("k-NN during the run, %", ("knn",)),
    ("linear probe during the run, %", ("linear",)), ("images/s", ("images_per_s",)),
)  # fmt: skip
MAX_COLUMNS, RUNS_A_ROW = 4, 6  # of panels, and of names in the legend


def save_figure(path: Path, figure: Any) -> None:
    """Write the figure and close it. Axes without a line are pictures or unused: they get no frame."""
    for axis in figure.get_axes():
        if not axis.lines:
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(path: Path, runs: Mapping[str, Sequence[dict[str, Any]]], panels: Panels) -> None:
    """Draw the logged lines of each run, by its name: a panel for each metric that any of the runs has logged."""
    logged = sorted({name for lines in runs.values() for line in lines for name in line})
    shown = [(title, [name for p in patterns for name in matching(logged, p)]) for title, patterns in panels]
    shown = [(title, names) for title, names in shown if names]
    columns = min(MAX_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    legend = 0.25 * -(-len(runs) // RUNS_A_ROW)
    width, height = 3.9 * columns, 3.1 * rows + legend
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # Margins in inches with room for tick labels and the legend: a constrained layout takes a second to find the same.
    margins = {
        "left": 0.6 / width,
        "right": 1 - 0.1 / width,
        "bottom": (0.6 + legend) / height,
        "top": 1 - 0.3 / height,
    }
    figure.subplots_adjust(**margins, wspace=0.21, hspace=0.35)
    for axis, (title, names) in zip(axes.flat, shown, strict=False):
        curves = [(run, name) for run in runs for name in names]
        for number, (run, name) in enumerate(curves):
            points = [(line["step"], line[name]) for line in runs[run] if name in line]
            marker = "o" if len(points) < 12 else None  # a few measurements, or one, would not show as a line
            axis.plot(*zip(*points, strict=True) if points else ([], []), color=f"C{number}", linewidth=1.2,
                      label=run if len(names) == 1 else name, marker=marker, markersize=4)  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(RUNS_A_ROW, len(runs)), fontsize=9)
    save_figure(path, figure)


def draw_points(
    path: Path,
    title: str,
    xlabel: str,
    rows: Sequence[tuple[str, Sequence[float], float, float | None]],
    baselines: Mapping[str, float],
) -> None:
    """Draw a row of points for each (label, values, mean, half of an interval), and a vertical line for each baseline."""
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.42 * len(rows)), layout="constrained")
    for number, (_, values, mean, interval) in enumerate(rows):
        axis.plot(values, [number] * len(values), "o", color="#00a6d6", markersize=5, alpha=0.8)
        axis.errorbar([mean], [number], xerr=interval, fmt="|", color="black", markersize=14, capsize=3, linewidth=1)
    for (label, value), style in zip(baselines.items(), (":", "-.", "--"), strict=False):
        axis.axvline(value, linestyle=style, color="gray", label=label)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.invert_yaxis()
    axis.set_xlabel(xlabel)
    axis.set_title(title)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(path, figure)
