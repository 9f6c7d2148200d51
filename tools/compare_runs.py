"""Compare several runs: `python tools/compare_runs.py RUN [RUN ...] [--out PNG] [--html PAGE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from train.command import run_command
from train.output.log import draw_curves, read_metrics
from train.output.report import write_comparison


def compare(folders: Sequence[Path], out: Path, page: Path | None) -> None:
    """Draw the curves of the runs into `out`, or write `page`. Raises ValueError for a folder that logged nothing."""
    named: dict[str, Path] = {}
    for folder in folders:
        if not read_metrics(folder):
            raise ValueError(
                f"{folder}: no metrics.jsonl with a line in it; give the folders of runs, such as runs/quickstart"
            )
        named[folder.name if folder.name not in named else str(folder)] = folder
    if page is None:
        draw_curves(out, {name: read_metrics(folder) for name, folder in named.items()})
    else:
        write_comparison(named, page)
    print(f"wrote {page or out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_runs", description=(__doc__ or "").splitlines()[0])
    add, default = parser.add_argument, Path("curves.png")
    add("runs", nargs="+", type=Path, metavar="RUN", help="The folder of a run.")
    add("--out", type=Path, default=default, metavar="PNG", help="The curves to draw. The default is %(default)s.")
    add("--html", type=Path, metavar="PAGE", help="Write a page with curves, results and differing settings instead.")
    args = parser.parse_args(arguments)
    return run_command("compare_runs", lambda: compare(args.runs, args.out, args.html))


if __name__ == "__main__":
    sys.exit(main())
