"""List the runs in a folder: `python tools/runs.py [FOLDER]`, with how each ended or that it goes on, its age, step and k-NN."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.shards.manifest import read_object
from pipeline.text import printable
from train.command import CommandParser, path_argument, run_command, write_json

REMEDY = "Remove it, or the run that wrote it"
COLUMNS = ("run", "status", "age", "step", "k-NN, %")


def describe_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield run, status, age_s of the last sign of life, step and knn of each run in `folder` and in the folders of a sweep."""
    for config in sorted([*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml")]):
        run = config.parent
        heartbeat, summary = (
            read_object(path, REMEDY) if (path := run / name).exists() else {} for name in ("heartbeat.json", "summary.json")
        )
        newest = max(path.stat().st_mtime for path in (run / "heartbeat.json", config) if path.exists())
        yield {
            "run": str(run.relative_to(folder)),
            "status": heartbeat.get("status", "complete" if summary else "unknown"),
            "age_s": round(time.time() - newest),
            "step": summary.get("step", heartbeat.get("step")),
            "knn": (summary.get("knn") or {}).get("trained"),
        }


def show_runs(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder}: no such folder; name the one with the runs (logging.run_dir)")
    rows = list(describe_runs(args.folder))
    if args.json:
        write_json(args.json, rows)
        return
    table = Table(*COLUMNS)
    for row in rows:
        age, knn = row["age_s"], "-" if row["knn"] is None else f"{row['knn']:.1f}"
        text = f"{age} s" if age < 120 else f"{age // 60} min" if age < 7200 else f"{age // 3600} h"
        table.add_row(printable(row["run"]), row["status"], text, "-" if row["step"] is None else f"{row['step']:,}", knn)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="runs", description=__doc__)
    parser.add_argument("folder", nargs="?", type=path_argument, default=Path("runs"), help="The default is %(default)s.")
    parser.add_json("a list of {run, status, age_s, step, knn}")
    args = parser.parse_args(arguments)
    return run_command("runs", lambda: show_runs(args))


if __name__ == "__main__":
    sys.exit(main())
