"""The study's tables and its plot, from the lines of its CSV."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

from tools.studies.grid import BASE, EXPERIMENTS, IMAGES, same_run

Row = dict[str, str]

# Two-sided 95% points of Student's t, by the number of seeds; beyond the table, the normal's.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
BASELINES = ("raw pixels", "random initialisation")
COLUMNS = (
    ("k-NN %", "knn"), ("linear %", "linear"), ("images", "images"), ("CPU s", "cpu_s"), ("images/CPU s", "images_per_cpu_s"),
    ("step memory, MiB", "step_mib"), ("peak above start, MiB", "peak_mib"),
)  # fmt: skip
CLAIMS = (
    ("k-NN, points at equal time", "knn", "+2 to +5 %"),
    ("linear probe, points at equal time", "linear", "+2 to +5 %"),
    ("memory of a step", "step_mib", "1.6x"),
    ("time of an image", "images_per_cpu_s", "1.4x"),
)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% interval; None for a single value."""
    if len(values) < 2:
        return values[0], None
    return statistics.mean(values), STUDENT.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5


def of_variant(rows: Sequence[Row], variant: str, equal: str) -> list[Row]:
    return [row for row in rows if row["variant"] == variant and row["equal"] == equal]


def numbers(rows: Sequence[Row], field: str) -> list[float]:
    return [float(row[field]) for row in rows if row[field]]


def cell(rows: Sequence[Row], field: str) -> str:
    values = numbers(rows, field)
    if not values:
        return ""
    mean, interval = mean_and_interval(values)
    if field not in ("knn", "linear"):
        return f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}"
    return f"{mean:.1f}" if interval is None else f"{mean:.1f} ± {interval:.1f}"


def experiment_lines(rows: Sequence[Row], title: str, variants: Sequence[tuple[str, str]]) -> list[str]:
    """A table of the variants (name, what is equal) that there are lines of."""
    head = ["variant", "seeds", *(name for name, _ in COLUMNS)]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant, equal in variants:
        found = of_variant(rows, variant, equal)
        if found:
            cells = [variant, str(len(found)), *(cell(found, field) for _, field in COLUMNS)]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def claim_lines(rows: Sequence[Row]) -> list[str]:
    """The three claims of the user's guide, against the single-crop baseline and against two globals."""
    lines = ["### The guide's claims for 2+6 crops", "", "| claim | said | over 1+0 | over 2+0 |", "|---|---|---|---|"]
    many = of_variant(rows, *same_run(BASE, ""))
    for title, field, said in CLAIMS:
        cells = []
        for other in ("1+0", "2+0"):
            pair = [numbers(part, field) for part in (many, of_variant(rows, other, "time"))]
            if not all(pair):
                cells.append("")
                continue
            more, less = (statistics.mean(values) for values in pair)
            ratio = less / more if field == "images_per_cpu_s" else more / less
            cells.append(f"{more - less:+.1f}" if field in ("knn", "linear") else f"{ratio:.2f}x")
        lines.append(f"| {title} | {said} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def write_tables(folder: Path, name: str, rows: Sequence[Row], steps: dict[str, int], budget: float) -> None:
    """folder/NAME.md and folder/NAME.png."""
    text = [
        f"## {name}",
        "",
        f"`python tools/study.py configs/{name}.yaml --budget {budget:g}`; on a CPU, one thread for torch. Equal time: "
        f"{budget:g} CPU seconds of training, all threads of the process, calibrated in steps "
        f"({', '.join(f'{variant}: {count:,}' for variant, count in steps.items())}). Equal images: as many as 2+6 saw. "
        "Mean over seeds ± half of the 95% interval (Student's t). Step memory: weights, gradients, moments and what the forward "
        "pass keeps; peak: of the whole process while it trains, over what it had before.",
        "",
    ]
    text += experiment_lines(rows, "Without training", [(baseline, "") for baseline in BASELINES])
    for title, variants, equal in EXPERIMENTS:
        text += experiment_lines(rows, title, [same_run(variant, equal) for variant in variants])
    (folder / f"{name}.md").write_text("\n".join(text + claim_lines(rows)))
    draw(folder / f"{name}.png", name, rows)


def draw(path: Path, name: str, rows: Sequence[Row]) -> None:
    """k-NN of every training as a point, by experiment, with mean and interval; baselines as lines."""
    shown = [
        (f"{variant}, equal images" if equal == IMAGES and variant != BASE else variant, *same_run(variant, equal))
        for _, variants, equal in EXPERIMENTS
        for variant in variants
    ]
    shown = [entry for entry in dict.fromkeys(shown) if of_variant(rows, *entry[1:])]
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.42 * len(shown)), layout="constrained")
    for place, (_, variant, equal) in enumerate(shown):
        values = numbers(of_variant(rows, variant, equal), "knn")
        mean, interval = mean_and_interval(values)
        axis.plot(values, [place] * len(values), "o", color="#00a6d6", markersize=5, alpha=0.8)
        axis.errorbar([mean], [place], xerr=interval, fmt="|", color="black", markersize=14, capsize=3, linewidth=1)
    for baseline, style in zip(BASELINES, (":", "--"), strict=True):
        values = numbers(of_variant(rows, baseline, ""), "knn")
        if values:
            axis.axvline(statistics.mean(values), linestyle=style, color="gray", label=baseline)
    axis.set_yticks(range(len(shown)), [label for label, _, _ in shown])
    axis.invert_yaxis()
    axis.set_xlabel("k-NN, % (points: seeds; bar: mean and 95% interval)")
    axis.set_title(name)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
