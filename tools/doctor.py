"""What would go wrong here, and the line that mends it: `python tools/doctor.py [CONFIG] [section.key=value ...]`.

Exit code 1 when a check failed, 2 when the settings themselves are wrong.
"""

import argparse
import faulthandler
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.checks.check import CHECKS, Case, examine
from train.config.load import load_config

FAILED, BAD_INPUT = 1, 2
# In the order of the report: what comes first is what the later ones stand on.
for _module in ("doctor_packages", "doctor_machine", "doctor_gpu", "doctor_data"):
    import_module(f"tools.{_module}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", nargs="?", help="the run's YAML file: its data, threads, device and rate are checked too"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--data", metavar="FOLDER", help="shards to look at; default: the config's data.data_path")
    parser.add_argument("--out", metavar="FOLDER", help="where runs are written; default: the config's, or runs")
    parser.add_argument("--json", action="store_true", help="print a list of {name, status, text, fix, seconds}")
    return parser.parse_intermixed_args(arguments)


def make_case(given: argparse.Namespace) -> Case:
    """Raises ValueError for a config that is wrong, FileNotFoundError for one that is not there."""
    if given.config is None:
        return Case(None, given.data, Path(given.out or "runs"))
    changes = [f"data.data_path={given.data}"] if given.data else []
    changes += [f"logging.run_dir={given.out}"] if given.out else []
    config = load_config(Path(given.config), [*given.overrides, *changes])
    return Case(config, config.data.data_path, Path(config.logging.run_dir))


def show(row: dict[str, Any]) -> None:
    print(f"{row['status']:4}  {row['name']}: {row['text']}", flush=True)
    if row["fix"]:
        print(f"      -> {row['fix']}", flush=True)


def run_checks(case: Case, as_json: bool) -> list[dict[str, Any]]:
    """Each finding is shown as it comes, so that one is seen even if the next check takes the process down."""
    rows = []
    for name, function in CHECKS.items():
        started = time.monotonic()
        finding = examine(function, case)
        rows.append({"name": name, **asdict(finding), "seconds": round(time.monotonic() - started, 2)})
        if not as_json:
            show(rows[-1])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        case = make_case(given)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    rows = run_checks(case, given.json)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "warn", "fail")}
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return FAILED if counts["fail"] else 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
