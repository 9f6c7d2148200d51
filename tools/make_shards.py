"""Make, check and index shards: `python tools/make_shards.py {sample,convert,index,verify} --help`."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.memory import memory_limit
from pipeline.shards.index import UNLABELLED
from pipeline.text import notify_after, plural, printable, say
from tools.shards.catalogue import LooseFiles, hold_out
from tools.shards.convert import COPIES_NAME, convert
from tools.shards.copies import group_copies
from tools.shards.formats import describe_skipped
from tools.shards.images import ImagePolicy
from tools.shards.labels import adopt_classes, number_labels, read_labels
from tools.shards.layouts.source import LAYOUTS, open_source
from tools.shards.photographs import NUM_SHARDS, photograph_source
from tools.shards.verify import index_split, remarks, split_folders, verify_split
from tools.shards.writer import RECORD_FOLDER, Conversion
from train.command import BAD_INPUT, CommandParser, count_argument, path_argument, run_command, show_messages

WORKER_BYTES = 1 << 29  # of memory, for each process that decodes images


def main(arguments: list[str] | None = None) -> int:
    parsed = build_parser().parse_args(arguments)
    show_messages()
    interrupted = "interrupted; run the same command again to continue where it stopped"
    return run_command("make_shards", lambda: parsed.run(parsed), interrupted)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="make_shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample = commands.add_parser("sample", help="Cut the quickstart's tiles from photographs in installed packages.")
    sample.add_argument("--out", type=path_argument, default=Path("shards/sample"), help="Output folder (default: %(default)s).")
    sample.set_defaults(run=run_sample)
    add_convert(commands.add_parser("convert", help="Convert a data set to verified, indexed shards."))
    for name, run, text in (
        ("verify", run_verify, "Check the checksums, the index and every image of finished shards."),
        ("index", run_index, "Index a WebDataset from another writer."),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=path_argument, help="A folder of tars, or a folder of such folders.")
        add_workers(command)
        command.set_defaults(run=run)
    return parser


def add_convert(command: argparse.ArgumentParser) -> None:
    default = "(default: %(default)s)"
    command.set_defaults(run=run_convert)
    text = "A folder of images, of class folders or of tars; a tar; parquet files; or a data set as downloaded."
    command.add_argument("source", type=path_argument, help=text)
    add = command.add_argument_group("output").add_argument
    add("--out", type=path_argument, required=True, help="Output folder; shards go to OUT/SPLIT.")
    add("--num-shards", type=count_argument, default=0, help="Number of shards (default: of 256 MiB or 10,000 images each).")
    add("--seed", type=int, default=Conversion.seed, help=f"Seed of the shuffle {default}.")
    add = command.add_argument_group("input").add_argument
    add("--split", choices=("train", "val"), default="train", help=f"The split to convert {default}.")
    add("--val-ratio", type=float, default=0.0, metavar="R", help="Hold out this share of every class as OUT/val.")
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help=f"How the source is read {default}.")
    labels = command.add_mutually_exclusive_group()
    labels.add_argument("--labels", type=path_argument, metavar="FILE", help="Take labels from lines name,label of a csv or txt.")
    labels.add_argument("--no-labels", action="store_true", help="Leave all labels out.")
    add = command.add_argument_group("images").add_argument
    add("--resize", type=count_argument, default=0, metavar="PIXELS", help="Reduce the shorter side to this; never enlarge.")
    add("--quality", type=int, choices=range(1, 101), metavar="1..100",
        help=f"Quality of resized JPEGs (default: {ImagePolicy.quality}).")  # fmt: skip
    add("--verify", choices=("header", "full"), default=ImagePolicy.verify, help=f"How far each image is decoded {default}.")
    add("--max-pixels", type=count_argument, default=ImagePolicy.max_pixels, help=f"Reject larger images {default}.")
    add("--max-bad-fraction", type=float, default=Conversion.max_bad_fraction,
        help=f"Stop when a larger share of the images is rejected {default}.")  # fmt: skip
    add_workers(command)


def add_workers(command: argparse.ArgumentParser) -> None:
    workers = max(1, min(len(os.sched_getaffinity(0)), memory_limit() // WORKER_BYTES))
    text = "Number of processes (default: one per core, fewer where memory is short: %(default)s here)."
    command.add_argument("--workers", type=count_argument, default=workers, help=text)


def run_convert(parsed: argparse.Namespace) -> None:
    options = convert_options(parsed)
    # List the images of every split and number their classes. Nothing is written but the spool of parquet files.
    spools = parsed.out / parsed.split / RECORD_FOLDER / "spool"
    with notify_after(2, f"listing the images of {parsed.source} ..."):
        source = open_source(parsed.source, parsed.split, spools, parsed.layout)
        roots = [container.root for container in source.catalogue.containers if isinstance(container, LooseFiles)]
        if inside := [root for root in roots if parsed.out.resolve().is_relative_to(root.resolve())]:
            # The next run would take the folder of the shards for a class.
            raise ValueError(f"--out {parsed.out} is inside the source {inside[0]}: choose a folder outside it")
        if parsed.labels:
            labels, note = read_labels(parsed.labels, source.catalogue.names)
            source = source.relabelled(*number_labels(labels), note)
        elif parsed.no_labels:
            source = source.relabelled([UNLABELLED] * len(source.catalogue), (), "labels are left out, as --no-labels says")
        parts = {parsed.split: source}
        if parsed.val_ratio:
            first = group_copies(source.catalogue, parsed.workers)
            parts["train"], parts["val"] = hold_out(source, first, parsed.val_ratio, parsed.seed)
        parts = {split: adopt_classes(part, parsed.out, split) for split, part in parts.items()}
    say(f"layout   {source.layout} ({printable('; '.join(filter(None, parts[parsed.split].notes)))})")
    if skipped := describe_skipped(source.skipped):
        say(skipped)
    if groups := [len(group) for part in parts.values() for group in part.copies]:
        sizes = f"{plural(len(groups), 'group')}, {max(groups):,} in the largest"
        say(f"copies   {sum(groups):,} images are equal or nearly so, in {sizes}; no group is in both splits ({COPIES_NAME})")
    for split, part in parts.items():
        say(convert(Conversion(part, parsed.out / split, split, **options)))
    shutil.rmtree(spools, ignore_errors=True)
    for line in remarks(parsed.out):
        say(f"note     {line}")


def convert_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Build the options. Raises ValueError for values out of range and for an option without an effect."""
    if parsed.quality and not parsed.resize:
        raise ValueError("--quality has no effect without --resize: images keep their bytes")
    ratio, fraction = parsed.val_ratio, parsed.max_bad_fraction
    if not 0 <= ratio < 1 or (ratio and parsed.split == "val"):
        raise ValueError(f"--val-ratio {ratio} --split {parsed.split}: needs a share below 1 and the train split")
    if not 0 <= fraction <= 1:
        raise ValueError(f"--max-bad-fraction {fraction} is outside 0..1")
    policy = ImagePolicy(parsed.verify, parsed.resize, parsed.quality or ImagePolicy.quality, parsed.max_pixels)
    same = {name: getattr(parsed, name) for name in ("seed", "num_shards", "max_bad_fraction", "workers")}
    return {"policy": policy, **same}


def run_verify(parsed: argparse.Namespace) -> int:
    code = 0
    for folder in split_folders(parsed.folder):
        problems = verify_split(folder, parsed.workers)
        say(f"{folder}: {plural(len(problems), 'problem') if problems else 'no problems'}")
        for line in problems:
            print(f"make_shards: {printable(line)}", file=sys.stderr)
            code = BAD_INPUT
    return code


def run_index(parsed: argparse.Namespace) -> None:
    for folder in split_folders(parsed.folder):
        say(f"{folder}: {plural(index_split(folder, parsed.workers), 'sample')} indexed")


def run_sample(parsed: argparse.Namespace) -> None:
    for split, num_shards in NUM_SHARDS.items():
        source, folder = photograph_source(split), parsed.out / split
        say(convert(Conversion(source, folder, split, num_shards=num_shards, max_bad_fraction=0)))


if __name__ == "__main__":
    sys.exit(main())
