"""Measure the project: `python tools/bench.py COMMAND [--json OUT]`, one command for each subject in `tools/benchmarks/`."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from train.command import run_command

COMMANDS = ("convert", "gpu", "pipeline", "save", "scale", "step", "store", "windows")
MODULES = {"store": "store.command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Each command prints its own table and returns the figures for `--json`."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = sys.argv[1:] if arguments is None else arguments
    for name in [name for name in COMMANDS if name in given[:1]] or COMMANDS:  # one alone, or all for --help
        module = import_module(f"tools.benchmarks.{MODULES.get(name, name)}")
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        command.add_argument("--json", type=Path, metavar="OUT", help="Write the figures to this file too.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return run_command("bench", lambda: measure(parser.parse_args(given)))


def measure(given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        if isinstance(value, int) and value < 1 and not isinstance(value, bool):
            raise ValueError(f"--{name.replace('_', '-')}: {value}, must be at least 1")
    figures = given.run(given)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
