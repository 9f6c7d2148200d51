"""The arena's tables and curves: ours beside other methods, from the rows and points of its CSVs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.studies.grid import BASE, IMAGES, TIME, same_run
from tools.studies.table import BASELINES, Row, experiment_lines, mean_and_interval, numbers, of_variant
from train.output.plots import plt, save_figure

TITLES = {TIME: "equal CPU time", IMAGES: "equal images"}
SCORES = {"knn": "k-NN", "linear": "linear probe"}
AXES = {TIME: ("cpu_s", "CPU seconds"), IMAGES: ("images", "images")}


def measured(rows: Sequence[Row]) -> dict[str, str]:
    """Of `TITLES`, those of which there is a training; equal time if there is none yet."""
    return {
        equal: title for equal, title in TITLES.items() if equal == TIME or any(row["equal"] == equal for row in rows)
    }


def lead_lines(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """Points by which the base leads each variant: the difference of the runs of a seed, over the seeds that both have."""
    columns = [(equal, score) for equal in measured(rows) for score in SCORES]
    head = [f"{SCORES[score]}, {TITLES[equal]}" for equal, score in columns]
    lines = [f"### Lead of {BASE}, points", "", "| over | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for variant in variants:
        cells = []
        for equal, score in columns:
            ours, theirs = (
                {row["seed"]: float(row[score]) for row in of_variant(rows, *same_run(name, equal))}
                for name in (BASE, variant)
            )
            leads = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            mean, interval = mean_and_interval(leads) if leads else (0.0, None)
            spread = "" if interval is None else f" ± {interval:.1f}"
            cells.append(f"{mean:+.1f}{spread}" if leads else "")
        if variant != BASE and any(cells):
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_arena(
    folder: Path,
    stem: str,
    command: str,
    variants: Sequence[str],
    rows: Sequence[Row],
    points: Sequence[Row],
    steps: dict[str, int],
    budget: float,
) -> None:
    """folder/STEM.md and folder/STEM.png."""
    counts = ", ".join(f"{variant}: {steps[variant]:,}" for variant in variants)
    text = [
        f"## {stem}",
        "",
        f"`{command}`; on a CPU, one thread for torch. {BASE} is ours. Equal CPU time: {budget:g} CPU seconds of training, all "
        f"threads of the process, calibrated in steps ({counts}); evaluations do not count. Equal images: as many as {BASE} saw. "
        "All variants have the base's loader, encoder, optimiser, schedule and moving average, which is what is measured. "
        "Mean over seeds ± half of the 95% interval (Student's t).",
        "",
    ]
    text += experiment_lines(rows, "Without training", [(baseline, "") for baseline in BASELINES])
    for equal, title in measured(rows).items():
        text += experiment_lines(rows, f"At {title}", [same_run(variant, equal) for variant in variants])
    (folder / f"{stem}.md").write_text("\n".join(text + lead_lines(rows, variants)))
    draw_arena(folder / f"{stem}.png", variants, rows, points)


def curve(points: Sequence[Row], of: str, score: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Means over the seeds, at each number of steps, of `of` and of the score, and the score's lowest and highest value."""
    steps = sorted({int(point["steps"]) for point in points})
    groups = [[point for point in points if int(point["steps"]) == step] for step in steps]
    scores = [numbers(group, score) for group in groups]
    x = [statistics.mean(numbers(group, of)) for group in groups]
    return (
        x,
        [statistics.mean(found) for found in scores],
        [min(found) for found in scores],
        [max(found) for found in scores],
    )


def draw_arena(path: Path, variants: Sequence[str], rows: Sequence[Row], points: Sequence[Row]) -> None:
    """k-NN and linear probe over CPU seconds and over images: mean and range of the seeds, baselines as gray lines."""
    shown = measured(rows)
    size = (2 + 5 * len(shown), 8)
    figure, axes = plt.subplots(2, len(shown), figsize=size, sharey="row", layout="constrained", squeeze=False)
    for (score, title), line in zip(SCORES.items(), axes, strict=True):
        for axis, equal in zip(line, shown, strict=True):
            of, label = AXES[equal]
            _draw_panel(axis, variants, points, (of, score, equal))
            for baseline, style in zip(BASELINES, (":", "-.", "--"), strict=True):
                if values := numbers(of_variant(rows, baseline, ""), score):
                    axis.axhline(statistics.mean(values), color="gray", linestyle=style, linewidth=1, label=baseline)
            axis.set_title(f"{title}, %: {shown[equal]}", fontsize=10)
            axis.set_xlabel(label, fontsize=8)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3 * len(shown), fontsize=9)
    save_figure(path, figure)


def _draw_panel(axis: Any, variants: Sequence[str], points: Sequence[Row], shown: tuple[str, str, str]) -> None:
    of, score, equal = shown
    for number, variant in enumerate(variants):
        if found := of_variant(points, *same_run(variant, equal)):
            x, mean, low, high = curve(found, of, score)
            axis.plot(x, mean, color=f"C{number}", marker="o", markersize=3, linewidth=1.4, label=variant)
            axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
