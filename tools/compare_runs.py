"""Write a page that compares runs: `python tools/compare_runs.py RUN [RUN ...] [--html PAGE]`."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.shards.manifest import read_object
from train.command import CommandParser, path_argument, run_command
from train.config.load import read_values
from train.config.yaml12 import flatten
from train.output.log import read_metrics
from train.output.report import REMEDY, html_table, line_charts, read_summary, summary_rows, write_html


def marked(folders: dict[str, Path]) -> tuple[dict[str, Path], str]:
    """Return the runs, with a letter in each name if they were not all measured alike, and a sentence that says so, else ""."""
    paths = {name: folder / "baselines.json" for name, folder in folders.items()}
    keys = {name: str(read_object(path, REMEDY).get("measured_on")) for name, path in paths.items() if path.exists()}
    kinds = list(dict.fromkeys(keys.values()))
    if len(kinds) < 2:
        return folders, ""
    letters = {name: f"{name} [{chr(ord('A') + kinds.index(keys[name]))}]" if name in keys else name for name in folders}
    note = "Accuracies of [A] and [B] do not compare: the images, evaluation.knn_k or evaluation.crop_ratio differ"
    return {letters[name]: folder for name, folder in folders.items()}, note


def write_comparison(folders: Mapping[str, Path], out: Path, note: str = "") -> Path:
    """Write the page `out` about several runs, by name: results side by side, the settings that differ, and shared charts.

    `note`: a sentence that comes first. Raises OSError.
    """
    results, settings = [], []
    for folder in folders.values():
        summary = folder / "summary.json"
        results.append(dict(summary_rows(read_summary(summary))) if summary.exists() else {})
        settings.append(flatten(read_values(folder / "config.yaml", {})))

    def side_by_side(runs: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> str:
        return html_table([("", *folders), *((key, *(str(run.get(key, "-")) for run in runs)) for key in keys)])

    keys = sorted({key for run in settings for key in run})
    parts = [
        f"<p>{note}</p>",
        f"<h2>Figures</h2>{side_by_side(results, dict.fromkeys(name for run in results for name in run))}",
        "<h2>Settings that differ</h2>",
        side_by_side(settings, [key for key in keys if len({repr(run.get(key)) for run in settings}) > 1]),
        line_charts({name: read_metrics(folder) for name, folder in folders.items()}),
    ]
    return write_html(out, ", ".join(folders), parts)


def compare(folders: Sequence[Path], page: Path) -> None:
    """Write `page` about the runs. Raises ValueError for a folder that logged nothing."""
    named: dict[str, Path] = {}
    for folder in folders:
        if not read_metrics(folder):
            raise ValueError(f"{folder}: no metrics.jsonl with a line in it; give the folders of runs, such as runs/quickstart")
        named[folder.name if folder.name not in named else str(folder)] = folder
    named, note = marked(named)
    write_comparison(named, page, note)
    if note:
        print(note)
    print(f"wrote {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="compare_runs", description=(__doc__ or "").splitlines()[0])
    add, default = parser.add_argument, Path("compared.html")
    add("runs", nargs="+", type=path_argument, metavar="RUN", help="The folder of a run.")
    add("--html", type=path_argument, default=default, metavar="PAGE", help="The page to write. The default is %(default)s.")
    args = parser.parse_args(arguments)
    return run_command("compare_runs", lambda: compare(args.runs, args.html))


if __name__ == "__main__":
    sys.exit(main())
