"""Write a page that compares runs: `python tools/compare_runs.py RUN [RUN ...] [--html PAGE]`."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.shards.manifest import read_object
from pipeline.text import say
from train.command import CommandParser, path_argument, run_command
from train.config.load import read_values
from train.config.yaml12 import flatten
from train.output.log import read_metrics
from train.output.report import REMEDY, html_table, line_charts, read_summary, summary_rows, write_html


def write_comparison(folders: Mapping[str, Path], out: Path) -> Path:
    """Write the page `out` about several runs, by name: results side by side, the settings that differ, and shared charts.

    Runs that were not all measured alike get a letter in their names, and a sentence that says so is printed too. Raises OSError.
    """
    paths = {name: folder / "baselines.json" for name, folder in folders.items()}
    keys = {name: str(read_object(path, REMEDY).get("measured_on")) for name, path in paths.items() if path.exists()}
    kinds, note = list(dict.fromkeys(keys.values())), ""
    if len(kinds) > 1:
        letters = {name: f" [{chr(ord('A') + kinds.index(key))}]" for name, key in keys.items()}
        folders = {name + letters.get(name, ""): folder for name, folder in folders.items()}
        note = "Accuracies of [A] and [B] do not compare: the images, evaluation.knn_k or evaluation.crop_ratio differ"
        print(note)
    summaries = [folder / "summary.json" for folder in folders.values()]
    results = [dict(summary_rows(read_summary(path))) if path.exists() else {} for path in summaries]
    settings = [flatten(read_values(folder / "config.yaml", {})) for folder in folders.values()]

    def side_by_side(runs: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> str:
        return html_table([("", *folders), *((key, *(str(run.get(key, "-")) for run in runs)) for key in keys)])

    names = sorted({key for run in settings for key in run})
    parts = [
        f"<p>{note}</p>",
        f"<h2>Figures</h2>{side_by_side(results, dict.fromkeys(name for run in results for name in run))}",
        "<h2>Settings that differ</h2>",
        side_by_side(settings, [key for key in names if len({repr(run.get(key)) for run in settings}) > 1]),
        line_charts({name: read_metrics(folder) for name, folder in folders.items()}),
    ]
    say(f"wrote {write_html(out, ', '.join(folders), parts)}")
    return out


def compare(folders: Sequence[Path], page: Path) -> None:
    """Write `page` about the runs. Raises ValueError for a folder that logged nothing."""
    named: dict[str, Path] = {}
    for folder in folders:
        if not read_metrics(folder):
            raise ValueError(f"{folder}: no metrics.jsonl with a line in it; give the folders of runs, such as runs/quickstart")
        named[folder.name if folder.name not in named else str(folder)] = folder
    write_comparison(named, page)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="compare_runs", description=(__doc__ or "").splitlines()[0])
    add, default = parser.add_argument, Path("compared.html")
    add("runs", nargs="+", type=path_argument, metavar="RUN", help="The folder of a run.")
    add("--html", type=path_argument, default=default, metavar="PAGE", help="The page to write. The default is %(default)s.")
    args = parser.parse_args(arguments)
    return run_command("compare_runs", lambda: compare(args.runs, args.html))


if __name__ == "__main__":
    sys.exit(main())
