"""The tables and plots of the study and of the arena, from the rows of their CSV files."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from scipy import stats

from tools.studies.grid import BASE, EXPERIMENTS, IMAGES, TIME, same_run

mpl.use("agg")

from matplotlib import pyplot as plt

Row = dict[str, str]

BASELINES = ("raw pixels", "colour histogram", "random initialisation")
LINE_STYLES = (":", "-.", "--")
# `step_mib`, the predicted memory of a step, is in older CSV files only.
COLUMN_FIELDS = {
    "k-NN %": "knn", "linear %": "linear", "images": "images", "CPU s": "cpu_s", "images/CPU s": "images_per_cpu_s",
    "step memory, MiB": "step_mib", "peak above start, MiB": "peak_mib",
}  # fmt: skip
CLAIMS = (
    ("k-NN, points at equal time", "knn", "+2 to +5 %"),
    ("linear probe, points at equal time", "linear", "+2 to +5 %"),
    ("memory of a step", "step_mib", "1.6x"),
    ("time of an image", "images_per_cpu_s", "1.4x"),
)
TITLES = {TIME: "equal CPU time", IMAGES: "equal images"}
SCORES = {"knn": "k-NN", "linear": "linear probe"}
AXES = {TIME: ("cpu_s", "CPU seconds"), IMAGES: ("images", "images")}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its 95% interval by Student's t; None for a single value."""
    if len(values) < 2:
        return values[0], None
    width = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(width)


def of_variant(rows: Sequence[Row], variant: str, equal: str) -> list[Row]:
    return [row for row in rows if row["variant"] == variant and row["equal"] == equal]


def numbers(rows: Sequence[Row], field: str) -> list[float]:
    return [float(row[field]) for row in rows if row.get(field)]


def format_cell(rows: Sequence[Row], field: str) -> str:
    values = numbers(rows, field)
    if not values:
        return ""
    mean, interval = mean_and_interval(values)
    if field not in SCORES:
        return f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}"
    return f"{mean:.1f}" if interval is None else f"{mean:.1f} ± {interval:.1f}"


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def experiment_lines(rows: Sequence[Row], title: str, runs: Sequence[tuple[str, str]]) -> list[str]:
    """Return a table of those runs (variant, what is equal) that have rows."""
    columns = {name: field for name, field in COLUMN_FIELDS.items() if field != "step_mib" or numbers(rows, field)}
    groups = ((variant, of_variant(rows, variant, equal)) for variant, equal in runs)
    cells = [
        [variant, str(len(group)), *(format_cell(group, field) for field in columns.values())]
        for variant, group in groups
        if group
    ]
    return markdown(title, ["variant", "seeds", *columns], cells)


def claim_lines(rows: Sequence[Row]) -> list[str]:
    """Return the claims of the user's guide, measured against the single-crop baseline and against two globals."""
    table, ours = [], of_variant(rows, *same_run(BASE, ""))
    for title, field, said in CLAIMS:
        if field == "step_mib" and not numbers(rows, field):
            continue
        cells = [title, said]
        for other in ("1+0", "2+0"):
            pair = [numbers(part, field) for part in (ours, of_variant(rows, other, TIME))]
            if not all(pair):
                cells.append("")
                continue
            more, less = (statistics.mean(values) for values in pair)
            ratio = less / more if field == "images_per_cpu_s" else more / less
            cells.append(f"{more - less:+.1f}" if field in SCORES else f"{ratio:.2f}x")
        table.append(cells)
    return markdown("The guide's claims for 2+6 crops", ["claim", "said", "over 1+0", "over 2+0"], table)


def write_study(folder: Path, name: str, rows: Sequence[Row], steps: dict[str, int], budget: float) -> None:
    """Write folder/NAME.md and folder/NAME.png."""
    counts = ", ".join(f"{variant}: {count:,}" for variant, count in steps.items())
    memory = "Step memory: weights, gradients, moments and what the forward pass keeps; peak: "
    if not numbers(rows, "step_mib"):
        memory = "Peak: "
    text = [
        f"## {name}",
        "",
        f"`python tools/study.py configs/{name}.yaml --budget {budget:g}`; on a CPU, one thread for torch. Equal time: "
        f"{budget:g} CPU seconds of training, all threads of the process, calibrated in steps ({counts}). Equal images: as many "
        f"as 2+6 saw. Mean over seeds ± half of the 95% interval (Student's t). {memory}of the whole process while it trains, "
        "over what it had before.",
        "",
    ]
    text += experiment_lines(rows, "Without training", [(baseline, "") for baseline in BASELINES])
    for title, variants, equal in EXPERIMENTS:
        text += experiment_lines(rows, title, [same_run(variant, equal) for variant in variants])
    (folder / f"{name}.md").write_text("\n".join(text + claim_lines(rows)))
    draw_study(folder / f"{name}.png", name, rows)


def draw_study(path: Path, name: str, rows: Sequence[Row]) -> None:
    """Draw k-NN of every training as a point, by experiment, with mean and interval; baselines as lines."""
    labels = [
        (f"{variant}, equal images" if equal == IMAGES and variant != BASE else variant, *same_run(variant, equal))
        for _, variants, equal in EXPERIMENTS
        for variant in variants
    ]
    scores = [(label, numbers(of_variant(rows, *run), "knn")) for label, *run in dict.fromkeys(labels)]
    points = [(label, values, *mean_and_interval(values)) for label, values in scores if values]
    baselines = {
        name: statistics.mean(values) for name in BASELINES if (values := numbers(of_variant(rows, name, ""), "knn"))
    }
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.42 * len(points)), layout="constrained")
    for number, (_, values, mean, interval) in enumerate(points):
        axis.plot(values, [number] * len(values), "o", color="#00a6d6", markersize=5, alpha=0.8)
        axis.errorbar([mean], [number], xerr=interval, fmt="|", color="black", markersize=14, capsize=3, linewidth=1)
    for (label, value), style in zip(baselines.items(), LINE_STYLES, strict=False):
        axis.axvline(value, linestyle=style, color="gray", label=label)
    axis.set_yticks(range(len(points)), [label for label, *_ in points])
    axis.invert_yaxis()
    axis.set_xlabel("k-NN, % (points: seeds; bar: mean and 95% interval)")
    axis.set_title(name)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measured_titles(rows: Sequence[Row]) -> dict[str, str]:
    """Return those of `TITLES` that have a training; equal time if there is none yet."""
    return {key: title for key, title in TITLES.items() if key == TIME or any(row["equal"] == key for row in rows)}


def lead_lines(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """Return the points by which the base leads each variant: the difference at the same seed, over the seeds both have."""
    columns = {
        f"{name}, {title}": (equal, score)
        for equal, title in measured_titles(rows).items()
        for score, name in SCORES.items()
    }
    table = []
    for variant in variants:
        cells = []
        for equal, score in columns.values():
            ours, theirs = (
                {row["seed"]: float(row[score]) for row in of_variant(rows, *same_run(name, equal))}
                for name in (BASE, variant)
            )
            leads = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            mean, interval = mean_and_interval(leads) if leads else (0.0, None)
            spread = "" if interval is None else f" ± {interval:.1f}"
            cells.append(f"{mean:+.1f}{spread}" if leads else "")
        if variant != BASE and any(cells):
            table.append([variant, *cells])
    return markdown(f"Lead of {BASE}, points", ["over", *columns], table)


def write_arena(
    path: Path, command: str, variants: Sequence[str], rows: Sequence[Row], points: Sequence[Row], steps: dict[str, int],
    budget: float,
) -> None:  # fmt: skip
    """Write PATH.md and PATH.png; `points` are all measurements during the trainings, `rows` the last ones."""
    counts = ", ".join(f"{variant}: {steps[variant]:,}" for variant in variants)
    text = [
        f"## {path.name}",
        "",
        f"`{command}`; on a CPU, one thread for torch. {BASE} is ours. Equal CPU time: {budget:g} CPU seconds of training, all "
        f"threads of the process, calibrated in steps ({counts}); evaluations do not count. Equal images: as many as {BASE} saw. "
        "All variants have the base's loader, encoder, optimiser, schedule and moving average, which is what is measured. "
        "Mean over seeds ± half of the 95% interval (Student's t).",
        "",
    ]
    text += experiment_lines(rows, "Without training", [(baseline, "") for baseline in BASELINES])
    for equal, title in measured_titles(rows).items():
        text += experiment_lines(rows, f"At {title}", [same_run(variant, equal) for variant in variants])
    path.with_name(f"{path.name}.md").write_text("\n".join(text + lead_lines(rows, variants)))
    draw_arena(path.with_name(f"{path.name}.png"), variants, rows, points)


def seed_means(points: Sequence[Row], x: str, score: str) -> list[tuple[float, float, float, float]]:
    """Return, for each number of steps, the means over seeds of `x` and of the score, and the score's minimum and maximum."""
    steps = sorted({int(point["steps"]) for point in points})
    groups = [[point for point in points if int(point["steps"]) == step] for step in steps]
    scores = [(numbers(group, x), numbers(group, score)) for group in groups]
    return [(statistics.mean(xs), statistics.mean(ys), min(ys), max(ys)) for xs, ys in scores]


def draw_arena(path: Path, variants: Sequence[str], rows: Sequence[Row], points: Sequence[Row]) -> None:
    """Draw k-NN and linear probe over CPU seconds and over images: mean and range of the seeds, baselines as gray lines."""
    titles = measured_titles(rows)
    size = (2 + 5 * len(titles), 8)
    figure, axes = plt.subplots(2, len(titles), figsize=size, sharey="row", layout="constrained", squeeze=False)
    for (score, name), panels in zip(SCORES.items(), axes, strict=True):
        for axis, equal in zip(panels, titles, strict=True):
            x, label = AXES[equal]
            draw_curves(axis, variants, points, x, score, equal)
            for baseline, style in zip(BASELINES, LINE_STYLES, strict=True):
                if values := numbers(of_variant(rows, baseline, ""), score):
                    axis.axhline(statistics.mean(values), color="gray", linestyle=style, linewidth=1, label=baseline)
            axis.set_title(f"{name}, %: {titles[equal]}", fontsize=10)
            axis.set_xlabel(label, fontsize=8)
            axis.grid(alpha=0.3)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3 * len(titles), fontsize=9
    )
    save_figure(path, figure)


def draw_curves(axis: Any, variants: Sequence[str], points: Sequence[Row], x: str, score: str, equal: str) -> None:
    for number, variant in enumerate(variants):
        if measured := of_variant(points, *same_run(variant, equal)):
            xs, mean, low, high = zip(*seed_means(measured, x, score), strict=True)
            axis.plot(xs, mean, color=f"C{number}", marker="o", markersize=3, linewidth=1.4, label=variant)
            axis.fill_between(xs, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
