"""The results of a run at its end: summary.json, report.html, and suggestions for the next run."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from pipeline.files import write_atomic
from pipeline.shards.manifest import read_as_expected, read_object
from pipeline.text import printable
from train.config.schema import Config
from train.output.log import Curve, MetricLines, curves_by_panel, read_metrics

if TYPE_CHECKING:
    from train.evaluation.online import OnlineEvaluation
    from train.trainer import Trainer

MAX_WAIT_PERCENT = 10.0
MIN_STEPS = 50  # shorter runs spend most of their time starting up
MIN_IMAGES = 100  # with fewer validation images, one image is more than a percentage point
MAX_POINTS = 400  # of a curve in a page: beyond that, groups of neighbouring points are averaged
SCORE_NAMES = {
    "chance": "chance",
    "pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "random_init": "random initialisation",
    "start": "starting weights, untouched",
    "trained": "trained encoder",
    "mixed": "mixed with the starting weights, exported",
    **{f"level_{rung}": f"level {rung}" for rung in range(4)},
}
PLACEMENT = (
    "Placement accuracy: of two random crops of a validation image, how often the nearest feature in the second crop is that of "
    "the cell that shows the same place. It needs no labels."
)
CAPTIONS = {
    "crops": "Images with the boxes of their crops (dashed: mirrored), and the crops as the encoder gets them",
    "masks": "What the encoder sees of each global crop, and the cells it predicts at every level",
    "features": "Three principal components of the patch features, as colours",
    "neighbours": "Some validation images and their nearest training images: green where the labels agree",
}
PAGE = Path(__file__).with_name("page.html")
REMEDY = "Run the training command again: it writes the file again"


def write_summary(trainer: "Trainer", probe: "OnlineEvaluation", device: str) -> dict[str, Any]:
    """Write summary.json with the latest scores of `probe`, and return its content. Percentages are 0..100."""
    state = trainer.state
    summary = {
        "run_name": trainer.config.logging.run_name, "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "device": device, "train_s": state.train_s, "steps": state.step, "images": state.images,
        "images_per_s": state.images / state.train_s, "data_wait_percent": 100 * state.wait_s / state.train_s,
        "loss_first": state.loss_first, "loss_last": state.loss_last, "rankme": probe.rankme,
        "width": trainer.model.encoder.width, "placement": probe.placement or None, "measured_on": probe.measured_on,
        "validation_images": probe.num_validation, "knn": probe.scores, "mixtures": probe.mixtures or None,
        "one_label": probe.one_label, "linear": probe.linear, "bad_samples": state.bad_samples,
        "skipped_steps": state.skipped_steps, "collapse_alarms": state.alarms, "collapsed": state.collapsed,
    }  # fmt: skip
    write_atomic(trainer.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def current_summary(folder: Path, steps: int, measured_on: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the content of summary.json if it is of so many steps and of these measurements, else None."""
    try:
        summary = read_summary(folder / "summary.json")
    except (OSError, ValueError):  # absent or damaged: it is written again
        return None
    return summary if (summary.get("steps"), summary.get("measured_on")) == (steps, measured_on) else None


def read_summary(path: Path) -> dict[str, Any]:
    """Return the content of a summary.json. Raises OSError, and ValueError for one that cannot be shown."""
    summary = read_object(path, REMEDY)
    with read_as_expected(path, REMEDY):
        summary_rows(summary)
    return summary


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of `summary`, the content of summary.json, as every table shows them."""
    # `get`: summaries of older versions lack some keys.
    knn, placement, images = summary.get("knn") or {}, summary.get("placement") or {}, summary["validation_images"]

    def show(form: str, value: float | None) -> str:
        return "" if value is None else form.format(value)

    rankme = show("{:.1f}", summary.get("rankme"))
    rows = [
        ("images seen", f"{summary['images']:,}"),
        ("images/s", f"{summary['images_per_s']:.0f}"),
        ("data wait", f"{summary['data_wait_percent']:.1f} %"),
        ("loss, first -> last", show("{:.4f} -> ", summary["loss_first"]) + show("{:.4f}", summary["loss_last"])),
        ("bad samples, replaced", show("{:,}, see quarantine.jsonl", summary["bad_samples"] or None)),
        ("steps skipped, not finite", show("{:,}", summary["skipped_steps"] or None)),
        ("collapse alarms at steps", ", ".join(map(str, summary["collapse_alarms"]))),
        ("RankMe of the trained features", rankme and f"{rankme} of {min(summary['width'], images)}"),
        ("validation images", rankme and f"{images:,}"),
        *((f"k-NN, {name}", show("{:.1f} %", knn.get(key))) for key, name in SCORE_NAMES.items()),
        ("linear probe, trained encoder", show("{:.1f} %", summary.get("linear"))),
        *((f"placement, {name}", show("{:.1f} %", placement.get(key))) for key, name in SCORE_NAMES.items()),
    ]
    return [(name, value) for name, value in rows if value]


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the run's results as a table for the terminal."""
    table = Table(title=f"{summary['run_name']}: {summary['steps']} steps", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in summary_rows(summary):
        if name in ("k-NN, raw pixels", "placement, chance"):
            table.add_section()
        table.add_row(name, value)
    return table


def write_page(folder: Path, hints: Sequence[str] = ()) -> Path:
    """Write `folder/report.html` from the run's files: summary.json, metrics.jsonl, config.yaml, environment.json, figures/.

    The page needs no other file and no network. `hints`: suggestions, one sentence each. Raises OSError.
    """
    summary = read_object(folder / "summary.json", REMEDY)
    knn, linear, rankme, placement = summary["knn"], summary["linear"], summary["rankme"], summary.get("placement")
    tiles = [
        knn and (f"{knn['trained']:.1f} %", "k-NN, trained encoder"),
        linear is not None and (f"{linear:.1f} %", "linear probe, trained encoder"),
        (f"{summary['images_per_s']:,.0f}", "images per second"),
        (f"{summary['data_wait_percent']:.1f} %", "of the time waiting for data"),
        rankme is not None and (f"{rankme:.1f}", "RankMe of the features"),
        placement and (f"{placement['trained']:.1f} %", "placement accuracy"),
    ]
    pictures = [path for path in sorted((folder / "figures").glob("*.png")) if path.stem in CAPTIONS]
    environment = read_object(folder / "environment.json", REMEDY)
    taken = f"{timedelta(seconds=round(summary['train_s']))} on {summary['device']}" if "device" in summary else ""
    header = [summary.get("finished"), f"{summary['steps']:,} steps, {summary['images']:,} images", taken]
    header.append(environment.get("commit") and f"commit {environment['commit']}")
    metrics = read_metrics(folder)
    for name, scores in (("placement", placement), ("knn", knn)):
        if scores:
            metrics.insert(0, {"step": 0, name: scores.get("start", scores.get("random_init"))})
    parts = [
        f'<p class="soft">{escape(" · ".join(filter(None, header)))}</p>',
        f"<p><code>{escape(printable(environment['command']))}</code></p>" if "command" in environment else "",
        '<div class="tiles">',
        *(f'<div class="tile"><b>{tile[0]}</b><span>{tile[1]}</span></div>' for tile in tiles if tile),
        "</div>",
        _bars("<h2>Does it beat what needs no training?</h2>", "k-NN", knn),
        _bars(f'<h2>Do its tokens find their place?</h2><p class="soft">{PLACEMENT}</p>', "placement", placement),
        f"<h2>What to try next</h2><ul>{_elements('li', hints)}</ul>" if hints else "",
        line_charts({"": metrics}),
        "<h2>Pictures</h2>",
        *map(_picture, pictures),
        f"<h2>All figures</h2>{html_table(summary_rows(summary))}",
        "<h2>Settings and machine</h2>",
        *(
            f"<details><summary>{title} ({name})</summary><pre>{escape((folder / name).read_text())}</pre></details>"
            for title, name in (("Settings", "config.yaml"), ("Machine and packages", "environment.json"))
        ),
    ]
    return write_html(folder / "report.html", summary["run_name"], parts)


def write_html(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a page with a title, which is escaped here, and parts in HTML, without the empty ones."""
    page, body = PAGE.read_text(), "\n".join(filter(None, parts))
    write_atomic(path, page.replace("{{title}}", escape(title)).replace("{{body}}", body))
    return path


def line_charts(runs: Mapping[str, MetricLines]) -> str:
    """Return the charts of runs, by name, for the page's script to draw."""
    charts = []
    for title, curves in curves_by_panel(runs).items():
        kept = {name: thin_out(curve) for name, curve in curves.items()}
        if any(kept.values()):
            charts.append(f'<figure class="chart" title="{escape(title)}" data-lines="{escape(json.dumps(kept))}"></figure>')
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def thin_out(points: Curve) -> list[list[float]]:
    """Return the finite points in five digits, or the means of equal groups of neighbours if there are too many."""
    array = np.array(points, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    groups = np.array_split(array, min(MAX_POINTS, len(array))) if len(array) else []
    return [[float(f"{value:.5g}") for value in group.mean(axis=0)] for group in groups]


def _bars(head: str, score: str, values: Mapping[str, float] | None) -> str:
    """Return the percentages of a score as bars below a head, in the order of SCORE_NAMES; "" if there are none."""
    bars = [
        f'<span>{score}, {name}</span><div class="{key}" style="width:{values[key]:.1f}%"></div><b>{values[key]:.1f} %</b>'
        for key, name in SCORE_NAMES.items()
        if values and key in values
    ]
    return f'{head}<div class="bars">{"".join(bars)}</div>' if bars else ""


def _picture(path: Path) -> str:
    data, caption = base64.b64encode(path.read_bytes()).decode(), CAPTIONS[path.stem]
    return (
        f'<figure class="picture"><figcaption>{caption}</figcaption>'
        f'<div class="scroll"><img alt="{caption}" src="data:image/png;base64,{data}"></div></figure>'
    )


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a table, the first cell of each as its head."""
    lines = "".join(f"<tr>{_elements('th', row[:1])}{_elements('td', row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def _elements(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(printable(text))}</{tag}>" for text in texts)


def stop_setting(config: Config, steps: int) -> str:
    """Return the setting that ends a run after so many steps, with its value."""
    limit, epochs = config.training.max_steps, config.training.epochs
    return f"training.epochs, now {epochs}" if limit is None or steps < limit else f"training.max_steps, now {limit}"


def forgetting(config: Config, knn: dict[str, float] | None) -> str | None:
    """Return what to change if the encoder's k-NN has fallen below that of the weights that it started from."""
    if knn is None or "start" not in knn or knn["trained"] >= knn["start"]:
        return None
    return (
        f"forgetting: k-NN is {knn['trained']:.1f} %, with the starting weights, untouched, {knn['start']:.1f} %. Lower "
        f"training.lr (now {config.training.lr:g}), write training.optimizer=adamw and training.train_blocks=last_2, raise "
        f"loss.anchor_weight (now {config.loss.anchor_weight:g}) or training.ema_momentum, or train shorter"
    )


def advice(config: Config, summary: dict[str, Any]) -> list[str]:
    """Return a suggestion for each problem of a run. `summary` is the content of summary.json."""
    data, knn, images = config.data, summary["knn"], summary["validation_images"]
    hints = []
    if summary["steps"] >= MIN_STEPS and summary["data_wait_percent"] > MAX_WAIT_PERCENT:
        hints.append(
            f"too slow: the model waited for data {summary['data_wait_percent']:.0f} % of the time. Fewer "
            f"data.multicrop.num_local_crops (now {data.multicrop.num_local_crops}), more data.num_workers (now "
            f"{data.num_workers}) and cores, smaller stored images (make_shards.py convert --resize 512), or a local disk"
        )
    if summary.get("one_label"):
        hints.append(
            "no accuracies: all training images have one label, so they would mean nothing. Convert a folder that holds one "
            "folder for each class, or judge by neighbours.png and features.png"
        )
    if knn is not None and images < MIN_IMAGES:
        hints.append(
            f"accuracies are measured on only {images} validation images, {100 / images:.1f} points each: too few to judge by. "
            "Set more aside (make_shards.py convert --val-ratio), or look at neighbours.png and features.png"
        )
    elif hint := forgetting(config, knn):
        hints.append(hint)
    elif knn is not None and knn["trained"] <= knn["random_init"]:
        hints.append(
            f"poor results: k-NN is no better than with the random initialisation ({knn['random_init']:.1f} %). Train longer "
            f"({stop_setting(config, summary['steps'])}), try another masking.strategy, a training.lr two or four times "
            "higher or lower, or weaker augmentation (data.multicrop.*_color_jitter, data.augmentation)"
        )
    return hints
