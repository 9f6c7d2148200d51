"""Several runs together: `python tools/compare_runs.py RUN [RUN ...] [--out PNG] [--html PAGE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.command import run_command
from train.output.log import read_metrics
from train.output.page import write_comparison
from train.output.plots import COMPARED_PANELS, draw_curves


def read_runs(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Logged lines by the run's name, or its path where two have the same. ValueError for a folder that logged nothing."""
    runs = {}
    for folder in folders:
        lines = read_metrics(folder)
        if not lines:
            raise ValueError(
                f"{folder}: no metrics.jsonl with a line in it; give the folders of runs, such as runs/quickstart"
            )
        runs[folder.name if folder.name not in runs else str(folder)] = lines
    return runs


def compare(folders: Sequence[Path], out: Path, page: Path | None) -> None:
    runs = read_runs(folders)
    if page is None:
        draw_curves(out, runs, COMPARED_PANELS)
    else:
        write_comparison(dict(zip(runs, folders, strict=True)), page)
    print(f"wrote {page or out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_runs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="The folder of a run.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves.png"),
        metavar="PNG",
        help="The picture of the curves. The default is %(default)s.",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="PAGE",
        help="Write one page with curves, results and differing settings instead of the picture.",
    )
    given = parser.parse_args(arguments)
    return run_command("compare_runs", lambda: compare(given.runs, given.out, given.html))


if __name__ == "__main__":
    sys.exit(main())
