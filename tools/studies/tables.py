"""The tables and plots of the study and of the arena, from the rows of their CSV files."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from scipy import stats

from pipeline.text import markdown_table
from tools.studies.grid import BASE, CONTINUED, TIME, TITLES, UNTOUCHED, Run, plan_sections

mpl.use("agg")

from matplotlib import pyplot as plt

Row = dict[str, str]

BASELINES = ("raw pixels", "colour histogram", "random initialisation", UNTOUCHED)
# `step_mib`, the predicted memory of a step, is in older CSV files only.
COLUMN_FIELDS = {
    "k-NN %": "knn", "linear %": "linear", "dense k-NN %": "dense_knn", "dense linear %": "dense_linear",
    "placement %": "placement", "not mixed, k-NN %": "unmixed", "share in the mixture": "share", "images": "images",
    "CPU s": "cpu_s", "images/CPU s": "images_per_cpu_s", "step memory, MiB": "step_mib", "peak above start, MiB": "peak_mib",
}  # fmt: skip
OPTIONAL = ("dense_knn", "dense_linear", "placement", "unmixed", "share")  # shown where they were measured
SCORES = {"knn": "k-NN", "linear": "linear probe", "dense_knn": "dense k-NN", "dense_linear": "dense linear"}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its 95% interval by Student's t; None for a single value."""
    if len(values) < 2:
        return values[0], None
    width = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(width)


def rows_of(rows: Sequence[Row], run: Run) -> list[Row]:
    return [row for row in rows if (row["variant"], row["equal"]) == run]


def numbers(rows: Sequence[Row], field: str) -> list[float]:
    return [float(row[field]) for row in rows if row.get(field)]


def format_cell(values: Sequence[float], form: str) -> str:
    """Return the mean and half of its interval; "" without values."""
    if not values:
        return ""
    mean, interval = mean_and_interval(values)
    return f"{mean:{form}}" if interval is None else f"{mean:{form}} ± {interval:.1f}"


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"### {title}", "", markdown_table(head, rows), ""]


def section_lines(rows: Sequence[Row], title: str, runs: Sequence[Run]) -> list[str]:
    """Return a table of those runs that have rows."""
    table = []
    columns = {head: field for head, field in COLUMN_FIELDS.items() if field not in OPTIONAL or numbers(rows, field)}
    for run in runs:
        if group := rows_of(rows, run):
            cells = [run[0], str(len(group))]
            for field in columns.values():
                values = numbers(group, field)
                mean = statistics.mean(values) if values else 0.0
                short = f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}"
                cells.append(format_cell(values, ".1f") if field in (*SCORES, *OPTIONAL) else short if values else "")
            table.append(cells)
    return markdown(title, ["variant", "seeds", *columns], table)


def lead_lines(rows: Sequence[Row], leader: str, others: Sequence[str], equals: Sequence[str]) -> list[str]:
    """Return the leader's lead over each other variant, in points: the difference at the same seed, over the seeds both have."""
    columns = [(equal, score) for equal in equals for score in SCORES if numbers(rows, score)]
    table = []
    for variant in others:
        cells = []
        for equal, score in columns:
            runs = ((leader, TIME), (variant, "" if variant in BASELINES else TIME if variant == BASE else equal))
            ours, theirs = ({row["seed"]: float(row[score]) for row in rows_of(rows, run) if row.get(score)} for run in runs)
            cells.append(format_cell([ours[seed] - theirs[seed] for seed in ours if seed in theirs], "+.1f"))
        if any(cells):
            table.append([variant, *cells])
    heads = [f"{SCORES[score]}, {TITLES[equal]}" for equal, score in columns]
    return markdown(f"Lead of {leader}, points", ["over", *heads], table)


def write_tables(
    path: Path, command: str, variants: Sequence[str], leader: str, rows: Sequence[Row], steps: dict[str, int], budget: float
) -> None:
    """Write PATH.md, a table for each section, and PATH.png, the k-NN of every training as a point; baselines are lines.

    `variants` of an arena begin with the base; the `leader` is one of them. The study has none.
    """
    counts = ", ".join(f"{variant}: {steps[variant]:,}" for variant in variants or steps)
    words = (
        f"{BASE} is trained from nothing; the others continue from the weights, with configs/continue.yaml. The share of the "
        "trained encoder in the mixture with them is chosen by k-NN among the training images, each left out. "
        if CONTINUED in variants
        else "All variants have the base's loader, encoder, optimiser, schedule and moving average, which is what is measured. "
    )
    intro = (
        f"`{command}`; on a CPU, one thread for torch. {BASE} is ours. Equal CPU time: {budget:g} CPU seconds of training, all "
        f"threads of the process, calibrated in steps ({counts}); evaluations do not count. Equal images: as many as {BASE} saw. "
        f"{words}Mean over seeds ± half of the 95% interval (Student's t)."
    )
    equals = [equal for equal in TITLES if any(row["equal"] == equal for row in rows)]
    sections, others = plan_sections(variants, equals), [name for name in (UNTOUCHED, *variants) if name != leader]
    text = [f"## {path.name}", "", intro, ""]
    for title, runs in {"Without training": [(name, "") for name in BASELINES], **sections}.items():
        text += section_lines(rows, title, runs)
    text += lead_lines(rows, leader, others, equals) if variants else []
    path.with_name(f"{path.name}.md").write_text("\n".join(text))
    points = []
    for variant, equal in dict.fromkeys(run for runs in sections.values() for run in runs):
        if values := numbers(rows_of(rows, (variant, equal)), "knn"):
            label = variant if equal == TIME else f"{variant}, equal images"
            points.append((label, values, *mean_and_interval(values)))
    scores = {name: numbers(rows_of(rows, (name, "")), "knn") for name in BASELINES}
    baselines = {name: statistics.mean(values) for name, values in scores.items() if values}
    label = "k-NN, % (points: seeds; bar: mean and 95% interval)"
    draw_points(path.with_name(f"{path.name}.png"), label, points, baselines)


def draw_points(
    path: Path, xlabel: str, rows: Sequence[tuple[str, Sequence[float], float, float | None]], baselines: dict[str, float]
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
    axis.set_title(path.stem)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
