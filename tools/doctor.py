"""What would go wrong here, each with a suggested fix: `python tools/doctor.py [CONFIG] [section.key=value ...]`.

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
from train.command import run_command
from train.config.load import load_config

FAILED = 1
# In the order of the report: later checks rely on earlier ones.
for _module in ("packages", "machine", "gpu", "data"):
    import_module(f"tools.checks.{_module}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", nargs="?", help="The YAML file of a run. With it, its data, threads, device and rate are checked too."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="Settings that replace those of the file."
    )
    parser.add_argument(
        "--data", metavar="FOLDER", help="Check these shards. The default is data.data_path of the config."
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="Check this folder for runs. The default is logging.run_dir of the config, or runs.",
    )
    parser.add_argument("--json", action="store_true", help="Print a list of {name, status, text, fix, seconds}.")
    return parser.parse_intermixed_args(arguments)


def make_case(given: argparse.Namespace) -> Case:
    """Raises ValueError for a wrong config, FileNotFoundError for a missing one."""
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
    """Each finding is shown at once, so that it is seen even if the next check takes the process down."""
    rows = []
    for name, function in CHECKS.items():
        started = time.monotonic()
        finding = examine(function, case)
        rows.append({"name": name, **asdict(finding), "seconds": round(time.monotonic() - started, 2)})
        if not as_json:
            show(rows[-1])
    return rows


def diagnose(given: argparse.Namespace) -> int:
    rows = run_checks(make_case(given), given.json)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "warn", "fail")}
    print(
        json.dumps(rows, indent=1) if given.json else ", ".join(f"{count} {status}" for status, count in counts.items())
    )
    return FAILED if counts["fail"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("doctor", lambda: diagnose(parse_arguments(arguments)))


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
