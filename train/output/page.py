"""report.html: a run, or several side by side, as one page that needs no other file and no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from pipeline.shards.manifest import read_object
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
REMEDY = "Run the training command again: it writes the file anew"
WIDE = ("crops", "masks")  # many columns: on a phone they scroll instead of shrinking


def write_page(folder: Path, hints: Sequence[str] = ()) -> Path:
    """Write `folder/report.html` from the run's files: summary.json, metrics.jsonl, config.yaml, environment.json, figures/.

    `hints`: what to try next, one line each. Raises OSError.
    """
    summary = read_object(folder / "summary.json", REMEDY)
    metrics = read_metrics(folder)
    parts = [
        f"<h1>{escape(summary['run_name'])}</h1>",
        f'<p class="soft">{summary["steps"]:,} steps, {summary["images"]:,} images</p>',
        _tiles(summary),
        _accuracies(summary),
        _hints(hints),
        "<h2>Curves</h2>",
        _charts({"": metrics}),
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
    """Write the page `out` about runs, by name: their curves in shared charts, their results side by side, and the settings
    that differ. Raises OSError.
    """
    runs = {name: read_metrics(folder) for name, folder in folders.items()}
    rows, settings = {}, {}
    for name, folder in folders.items():
        summary = folder / "summary.json"
        rows[name] = dict(summary_rows(read_object(summary, REMEDY))) if summary.exists() else {}
        settings[name] = _flat(yaml.safe_load((folder / "config.yaml").read_text()) or {})
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    differing = sorted(
        key
        for key in {key for found in settings.values() for key in found}
        if len({repr(found.get(key)) for found in settings.values()}) > 1
    )
    title = ", ".join(runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Figures</h2>",
        _table(["", *runs], [(name, *(found.get(name, "-") for found in rows.values())) for name in names]),
        "<h2>Settings that differ</h2>",
        _table(["", *runs], [(key, *(str(found.get(key, "-")) for found in settings.values())) for key in differing]),
        "<h2>Curves</h2>",
        _charts(runs),
    ]
    return _write(out, title, parts)


def _write(path: Path, title: str, parts: Sequence[str]) -> Path:
    values = {"left": LEFT, "right": RIGHT, "width": WIDTH}
    page = Template(PAGE.read_text()).substitute(title=escape(title), body="\n".join(filter(None, parts)), **values)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(page)
    temporary.replace(path)
    return path


def _tiles(summary: Mapping[str, Any]) -> str:
    tiles = [
        (f"{summary['images_per_s']:,.0f}", "images per second"),
        (f"{summary['data_wait_percent']:.1f} %", "of the time waiting for data"),
    ]
    if summary["knn"] is not None:
        tiles.insert(0, (f"{summary['knn']['trained']:.1f} %", "k-NN, trained encoder"))
    if summary["linear"] is not None:
        tiles.insert(1, (f"{summary['linear']:.1f} %", "linear probe, trained encoder"))
    if summary["rankme"] is not None:
        tiles.append((f"{summary['rankme']:.1f}", "RankMe of the features"))
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{shown}</div>'


def _accuracies(summary: Mapping[str, Any]) -> str:
    if summary["knn"] is None:
        return ""
    bars = "".join(
        f"<span>{escape(KNN_NAMES[key])}</span>"
        f'<div class="{"ours" if key == "trained" else ""}" style="width:{summary["knn"][key]:.1f}%"></div>'
        f"<b>{summary['knn'][key]:.1f} %</b>"
        for key in KNN_NAMES
    )
    return f'<h2>Does it beat what needs no training?</h2><div class="bars">{bars}</div>'


def _hints(hints: Sequence[str]) -> str:
    if not hints:
        return ""
    return f"<h2>What to try next</h2><ul>{''.join(f'<li>{escape(hint)}</li>' for hint in hints)}</ul>"


def _charts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """All of CHARTS; `runs`: the lines of metrics.jsonl by run. Of several runs, each chart shows one metric."""
    charts = []
    for title, names in CHARTS:
        if len(runs) == 1:
            (lines,) = runs.values()
            charts.append(line_chart(title, {name: _series(lines, name) for name in names}))
        else:
            for name in names:
                label = title if len(names) == 1 else f"{title}: {name}"
                charts.append(line_chart(label, {run: _series(lines, name) for run, lines in runs.items()}))
    return f'<div class="charts">{"".join(charts)}</div>'


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    kind = "picture scroll wide" if path.stem in WIDE else "picture"
    caption = escape(CAPTIONS[path.stem])
    return (
        f'<figure class="picture"><figcaption>{caption}</figcaption>'
        f'<div class="{kind}"><img alt="{caption}" src="data:image/png;base64,{data}"></div></figure>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<p class="soft">None.</p>'
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    lines = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(value)}</td>' for value in row[1:])}</tr>" for row in rows
    )
    return f'<div class="scroll"><table>{top}{lines}</table></div>'


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
