"""Measure the project: `python tools/bench.py COMMAND [--json OUT]`, one command per module of `tools/benchmarks/`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pipeline.shards.cache import CacheSettings
from train.command import run_command

COMMANDS = {
    "convert": "Images per second of make_shards, against webdataset.ShardWriter and a plain copy of the same files.",
    "gpu": "Everything that only a GPU can tell, as one table for the README.",
    "pipeline": "Images per second and CPU time per image, against torchvision and a hand-written DALI pipeline.",
    "scale": "Start-up time and memory at the size of ImageNet, and how they grow to a billion samples.",
    "step": "Time, memory and FLOPs of one training step, against a loop over crops and against unmasked crops.",
    "store": "Images per second and requests of shards in an S3 store, against the same shards on a local disk.",
}


def add_options(command: argparse.ArgumentParser, name: str) -> None:
    """Add the options of one command. They are all here so that `--help` imports no torch and no DALI."""

    def number(flag: str, default: float, text: str) -> None:
        command.add_argument(flag, type=type(default), default=default, help=f"{text} The default is %(default)s.")

    cores = len(os.sched_getaffinity(0))
    command.add_argument("--json", type=Path, metavar="OUT", help="Also write the figures to this file.")
    if name in ("gpu", "pipeline", "store"):
        text = "Read these shards. By default, temporary shards of photographs of about 100 KB are made."
        command.add_argument("--shards", type=Path, metavar="DIR", help=text)
    if name in ("gpu", "step"):
        text = "Where to run; `gpu --device cpu` is a rehearsal with small sizes. The default is %(default)s."
        command.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=text)
    if name in ("gpu", "pipeline"):
        number("--threads", cores, "DALI threads, or worker processes of a DataLoader.")
    if name in ("pipeline", "store"):
        number("--batch", 32, "Images per batch.")
    if name == "convert":
        number("--images", 4096, "Images to convert, of 500x375 pixels and about 100 KB.")
        number("--rounds", 3, "Conversions per row; the median is printed.")
        number("--workers", cores, "Processes.")
        command.add_argument("--folder", type=Path, help="Write to this folder. By default /dev/shm, if there is one.")
    elif name == "gpu":
        number("--minutes", 8.0, "Time limit for all parts together.")
        text = "Run only these, separated by commas: checks, images/s, step, training, save."
        command.add_argument("--parts", help=text)
    elif name == "pipeline":
        number("--images", 256, "Images per row and round.")
        number("--rounds", 5, "Rounds; medians are printed.")
        text = "Run only these, separated by commas: ours, torchvision-pil, torchvision-v2, dali-native, decode-only."
        command.add_argument("--rows", help=text)
    elif name == "scale":
        number("--samples", 1_281_167, "Samples in the data set.")
        number("--shard-size", 1000, "Samples per shard.")
        number("--batch", 64, "Images per batch.")
    elif name == "step":
        text = "The encoder. The default is %(default)s."
        command.add_argument("--model", choices=("small", "tiny"), default="small", help=text)
        number("--batch", 4, "Images per batch, each with 2 + 6 crops.")
        number("--rounds", 5, "Rounds; medians are printed.")
        number("--context-ratio", 0.4, "Share of a global crop's tokens that is encoded.")
        number("--threads", 1, "Threads of torch.")
        command.add_argument(
            "--compile", action="store_true", help="Add the compiled step, which takes minutes to compile."
        )
    elif name == "store":
        number("--images", 4320, "Images to make, at 720 per shard.")
        number("--bandwidth", 10, "Bandwidth of the store in MB/s.")
        number("--rounds", 3, "Rounds; medians are printed.")
        number("--streams", CacheSettings.streams, "Concurrent downloads.")


def run_chosen(options: argparse.Namespace) -> None:
    """Run one benchmark, which prints its own table, and write its figures to `--json`. Raises ValueError for counts below 1."""
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1 and not isinstance(value, bool):
            raise ValueError(f"--{name.replace('_', '-')}: {value}, must be at least 1")
    figures = import_module(f"tools.benchmarks.{options.command}").run_benchmark(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        add_options(commands.add_parser(name, help=text, description=text), name)
    return run_command("bench", lambda: run_chosen(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
