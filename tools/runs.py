"""List the runs in a folder: `python tools/runs.py [FOLDER]`, with how each ended or that it goes on, its age, step and k-NN."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.shards.manifest import read_object
from pipeline.text import printable
from train.command import CommandParser, path_argument, run_command, write_json

REMEDY = "Remove it, or the run that wrote it"


def show_runs(args: argparse.Namespace) -> None:
    """Print name, status, time since the last sign of life, step and k-NN of the runs in a folder and in those of its sweeps."""
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder}: no such folder; name the one with the runs (logging.run_dir)")
    rows, table = [], Table("run", "status", "age", "step", "k-NN, %")
    for config in sorted([*args.folder.glob("*/config.yaml"), *args.folder.glob("*/*/config.yaml")]):
        run, paths = config.parent.relative_to(args.folder), [config.with_name(f"{n}.json") for n in ("heartbeat", "summary")]
        heartbeat, summary = (read_object(path, REMEDY) if path.exists() else {} for path in paths)
        status, step = heartbeat.get("status", "complete" if summary else "unknown"), heartbeat.get("step")
        age = round(time.time() - max(path.stat().st_mtime for path in (config, paths[0]) if path.exists()))
        knn = (summary.get("knn") or {}).get("trained")
        rows.append({"run": str(run), "status": status, "age_s": age, "step": step, "knn": knn})
        told = f"{age} s" if age < 120 else f"{age // 60} min" if age < 7200 else f"{age // 3600} h"
        shown = ("-" if step is None else f"{step:,}", "-" if knn is None else f"{knn:.1f}")
        table.add_row(printable(str(run)), status, told, *shown)
    if args.json:
        write_json(args.json, rows)
    else:
        Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="runs", description=__doc__)
    parser.add_argument("folder", nargs="?", type=path_argument, default=Path("runs"), help="The default is %(default)s.")
    parser.add_json("a list of {run, status, age_s, step, knn}")
    args = parser.parse_args(arguments)
    return run_command("runs", lambda: show_runs(args))


if __name__ == "__main__":
    sys.exit(main())
