"""Measure the project: `python tools/bench.py COMMAND [--json OUT]`, one command per module of `tools/benchmarks/`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from train.command import CommandParser, path_argument, run_command, write_json

COMMANDS = {
    "gpu": "Everything that only a GPU can tell, as one table for the README.",
    "pipeline": "Images per second and CPU time per image, against torchvision and DALI's own operators.",
    "step": "Time, memory and FLOPs of one training step, against a loop over crops and against unmasked crops.",
}
CORES = len(os.sched_getaffinity(0))
# (commands, flag, default or type, help): all options are here, so that `--help` imports no torch and no DALI.
OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("gpu pipeline", "shards", Path, "Read these shards instead of temporary ones of photographs of about 100 KB."),
    ("gpu step", "device", "auto", "auto, cpu or gpu; `gpu --device cpu` is a rehearsal with small sizes."),
    ("gpu pipeline", "threads", CORES, "DALI threads, or worker processes of a DataLoader."),
    ("gpu", "minutes", float, "Time limit with the start. The default is 8, and 3 with --parts."),
    ("gpu", "parts", str, "Run only these: parity, images/s, training, step, memory, save, compile."),
    ("pipeline", "rows", str, "Run only these: ours, torchvision, dali-operators, decode-only."),
    ("pipeline", "images", 256, "Images per row and round."),
    ("pipeline", "batch", 32, "Images per batch."),
    ("step", "batch", 4, "Images per batch, each with 2 + 6 crops."),
    ("pipeline step", "rounds", 5, "Rounds; medians are printed."),
    ("step", "model", "small", "The encoder, small or tiny."),
)
CHOICES = {"device": ("auto", "cpu", "gpu"), "model": ("small", "tiny")}


def add_options(command: CommandParser, name: str) -> None:
    command.add_json("the figures")
    for commands, flag, default, text in OPTIONS:
        if name not in commands.split():
            continue
        if isinstance(default, type):
            command.add_argument(f"--{flag}", type=path_argument if default is Path else default, help=text)
        else:
            text = f"{text} The default is %(default)s."
            command.add_argument(f"--{flag}", type=type(default), default=default, choices=CHOICES.get(flag), help=text)


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
        add_options(commands.add_parser(name, help=text, description=text), name)
    return run_command("bench", lambda: run_chosen(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
