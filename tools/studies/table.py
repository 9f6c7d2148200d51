"""The study's tables and its plot, from the rows of its CSV."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from tools.studies.grid import BASE, EXPERIMENTS, IMAGES, same_run
from train.output.plots import draw_points

Row = dict[str, str]

BASELINES = ("raw pixels", "colour histogram", "random initialisation")
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
    """The mean, and half the width of its 95% interval by Student's t; None for a single value."""
    if len(values) < 2:
        return values[0], None
    width = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(width)


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
    """A table of those variants (name, what is equal) that have rows."""
    head = ["variant", "seeds", *(name for name, _ in COLUMNS)]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant, equal in variants:
        found = of_variant(rows, variant, equal)
        if found:
            cells = [variant, str(len(found)), *(cell(found, field) for _, field in COLUMNS)]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def claim_lines(rows: Sequence[Row]) -> list[str]:
    """The claims of the user's guide, measured against the single-crop baseline and against two globals."""
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
    draw_study(folder / f"{name}.png", name, rows)


def draw_study(path: Path, name: str, rows: Sequence[Row]) -> None:
    """k-NN of every training as a point, by experiment, with mean and interval; baselines as lines."""
    labels = [
        (f"{variant}, equal images" if equal == IMAGES and variant != BASE else variant, *same_run(variant, equal))
        for _, variants, equal in EXPERIMENTS
        for variant in variants
    ]
    found = [(label, numbers(of_variant(rows, *run), "knn")) for label, *run in dict.fromkeys(labels)]
    points = [(label, values, *mean_and_interval(values)) for label, values in found if values]
    baselines = {
        name: statistics.mean(values) for name in BASELINES if (values := numbers(of_variant(rows, name, ""), "knn"))
    }
    draw_points(path, name, "k-NN, % (points: seeds; bar: mean and 95% interval)", points, baselines)
