"""report.html: a run, or several side by side, as one page that needs no other file and no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from pipeline.files import write_atomic
from pipeline.shards.manifest import read_object
from train.config.yaml12 import flatten
from train.output.chart import LEFT, RIGHT, WIDTH, line_chart
from train.output.display import KNN_NAMES, summary_rows
from train.output.log import read_metrics

PAGE = Path(__file__).with_name("page.html")
CHARTS = (
    ("Loss", ("loss",)),
    ("Prediction loss by level", ("level_0", "level_1", "level_2", "level_3", "summary", "inside", "outside")),
    ("View term", ("view",)),
    ("SIGReg", ("sigreg",)),
    ("k-NN and linear probe during the run, %", ("knn", "linear")),
    ("RankMe of pooled features", ("rankme",)),
    ("Images per second", ("images_per_s",)),
    ("Data wait, % of the step", ("data_wait_percent", "store_wait_percent")),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
)
CAPTIONS = {
    "crops": "Photographs with the boxes of their crops (dashed: mirrored), and the crops as the encoder gets them",
    "masks": "What the encoder sees of each global crop, and the cells it predicts at every level",
    "features": "Three principal components of the patch features, as colours",
    "neighbours": "Validation images and their nearest training images: green where the labels agree",
}
WIDE_PICTURES = ("crops", "masks")  # on a phone they scroll instead of shrinking
REMEDY = "Run the training command again: it writes the file again"


def write_page(folder: Path, hints: Sequence[str] = ()) -> Path:
    """Write `folder/report.html` from the run's files: summary.json, metrics.jsonl, config.yaml, environment.json, figures/.

    `hints`: suggestions, one sentence each. Raises OSError.
    """
    summary = read_object(folder / "summary.json", REMEDY)
    parts = [
        f"<h1>{escape(summary['run_name'])}</h1>",
        f'<p class="soft">{summary["steps"]:,} steps, {summary["images"]:,} images</p>',
        _tiles(summary),
        _accuracies(summary),
        f"<h2>What to try next</h2><ul>{_wrap('li', hints)}</ul>" if hints else "",
        "<h2>Curves</h2>",
        _charts({"": read_metrics(folder)}),
        "<h2>Pictures</h2>",
        *(_picture(path) for path in sorted((folder / "figures").glob("*.png")) if path.stem in CAPTIONS),
        "<h2>All figures</h2>",
        _table([], summary_rows(summary)),
        "<h2>Settings and machine</h2>",
        _details("Settings (config.yaml)", (folder / "config.yaml").read_text()),
        _details("Machine and packages (environment.json)", (folder / "environment.json").read_text()),
    ]
    return _write(folder / "report.html", summary["run_name"], parts)


def write_comparison(folders: Mapping[str, Path], out: Path) -> Path:
    """Write the page `out` about several runs, by name: shared charts, results side by side, and the settings that differ.

    Raises OSError.
    """
    results, settings = {}, {}
    for name, folder in folders.items():
        summary = folder / "summary.json"
        results[name] = dict(summary_rows(read_object(summary, REMEDY))) if summary.exists() else {}
        settings[name] = flatten(yaml.safe_load((folder / "config.yaml").read_text()) or {})

    def side_by_side(values: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> str:
        return _table(["", *folders], [(key, *(str(run.get(key, "-")) for run in values.values())) for key in keys])

    keys = sorted({key for run in settings.values() for key in run})
    title = ", ".join(folders)
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Figures</h2>",
        side_by_side(results, list(dict.fromkeys(name for run in results.values() for name in run))),
        "<h2>Settings that differ</h2>",
        side_by_side(settings, [key for key in keys if len({repr(run.get(key)) for run in settings.values()}) > 1]),
        "<h2>Curves</h2>",
        _charts({name: read_metrics(folder) for name, folder in folders.items()}),
    ]
    return _write(out, title, parts)


def _write(path: Path, title: str, parts: Sequence[str]) -> Path:
    values = {"left": LEFT, "right": RIGHT, "width": WIDTH}
    body = "\n".join(filter(None, parts))
    write_atomic(path, Template(PAGE.read_text()).substitute(title=escape(title), body=body, **values))
    return path


def _tiles(summary: Mapping[str, Any]) -> str:
    knn, linear, rankme = summary["knn"], summary["linear"], summary["rankme"]
    tiles = [
        knn and (f"{knn['trained']:.1f} %", "k-NN, trained encoder"),
        linear is not None and (f"{linear:.1f} %", "linear probe, trained encoder"),
        (f"{summary['images_per_s']:,.0f}", "images per second"),
        (f"{summary['data_wait_percent']:.1f} %", "of the time waiting for data"),
        rankme is not None and (f"{rankme:.1f}", "RankMe of the features"),
    ]
    shown = "".join(f'<div class="tile"><b>{tile[0]}</b><span>{tile[1]}</span></div>' for tile in tiles if tile)
    return f'<div class="tiles">{shown}</div>'


def _accuracies(summary: Mapping[str, Any]) -> str:
    if summary["knn"] is None:
        return ""
    bars = "".join(
        f"<span>{escape(name)}</span>"
        f'<div class="{"ours" if key == "trained" else ""}" style="width:{summary["knn"][key]:.1f}%"></div>'
        f"<b>{summary['knn'][key]:.1f} %</b>"
        for key, name in KNN_NAMES.items()
    )
    return f'<h2>Does it beat what needs no training?</h2><div class="bars">{bars}</div>'


def _charts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return all of CHARTS. `runs`: the lines of metrics.jsonl by run. With several runs, each chart shows one metric."""

    def points(run: str, metric: str) -> list[tuple[float, float]]:
        return [(line["step"], line[metric]) for line in runs[run] if line.get(metric) is not None]

    charts = []
    for title, metrics in CHARTS:
        if len(runs) == 1:
            charts.append(line_chart(title, {metric: points(run, metric) for run in runs for metric in metrics}))
            continue
        for metric in metrics:
            label = title if len(metrics) == 1 else f"{title}: {metric}"
            charts.append(line_chart(label, {run: points(run, metric) for run in runs}))
    return f'<div class="charts">{"".join(charts)}</div>'


def _picture(path: Path) -> str:
    data, caption = base64.b64encode(path.read_bytes()).decode(), escape(CAPTIONS[path.stem])
    kind = "picture scroll wide" if path.stem in WIDE_PICTURES else "picture"
    return (
        f'<figure class="picture"><figcaption>{caption}</figcaption>'
        f'<div class="{kind}"><img alt="{caption}" src="data:image/png;base64,{data}"></div></figure>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<p class="soft">None.</p>'
    top = f"<tr>{_wrap('th', head)}</tr>" if head else ""
    lines = "".join(f"<tr>{_wrap('th', row[:1])}{_wrap('td', row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{lines}</table></div>'


def _wrap(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
