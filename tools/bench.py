"""Measure the project: `python tools/bench.py COMMAND [--json OUT]`, one command per module of `tools/benchmarks/`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from train.command import CommandParser, path_argument, run_command, write_json

COMMANDS = {
    "gpu": "Everything that only a GPU can tell, as one table for the README.",
    "pipeline": "Images per second and CPU time per image, against torchvision and DALI's own operators.",
    "step": "Time, memory and FLOPs of one training step, against a loop over crops and against unmasked crops.",
}
CORES, DEVICES = len(os.sched_getaffinity(0)), ("auto", "cpu", "gpu")
# (commands, flag, arguments of argparse, help): all options are here, so that `--help` imports no torch and no DALI.
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("gpu pipeline", "shards", {"type": path_argument}, "Read these instead of temporary ones of photographs of about 100 KB."),
    ("gpu step", "device", {"default": "auto", "choices": DEVICES}, "`gpu --device cpu` rehearses with small sizes."),
    ("gpu pipeline", "threads", {"type": int, "default": CORES}, "DALI threads, or worker processes of a DataLoader."),
    ("gpu", "minutes", {"type": float}, "Time limit with the start. The default is 8, and 3 with --parts."),
    ("gpu", "parts", {}, "Run only these: parity, images/s, training, step, memory, save, compile."),
    ("pipeline", "rows", {}, "Run only these: ours, torchvision, dali-operators, decode-only."),
    ("pipeline", "images", {"type": int, "default": 256}, "Images per row and round."),
    ("pipeline", "batch", {"type": int, "default": 32}, "Images per batch."),
    ("step", "batch", {"type": int, "default": 4}, "Images per batch, each with 2 + 6 crops."),
    ("pipeline step", "rounds", {"type": int, "default": 5}, "Rounds; medians are printed."),
    ("step", "model", {"default": "small", "choices": ("small", "tiny")}, "The encoder."),
)


def run_chosen(options: argparse.Namespace) -> None:
    """Run one benchmark, which prints its own table, and write its figures to `--json`. Raises ValueError for counts below 1."""
    options.started = time.monotonic()  # before the imports
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name}: {value}, must be at least 1")
    figures = import_module(f"tools.benchmarks.{options.command}").run_benchmark(options)
    if options.json:
        write_json(options.json, figures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_json("the figures")
        for users, flag, settings, text in OPTIONS:
            if name in users.split():
                text += " The default is %(default)s." if "default" in settings else ""
                command.add_argument(f"--{flag}", help=text, **settings)
    return run_command("bench", lambda: run_chosen(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
