"""Make, check and describe shards: `python tools/make_shards.py {sample,convert,index,verify,stats} --help`."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.notices import notify_after
from tools.shards.archives import check_official
from tools.shards.catalogue import LooseFiles, Source, hold_out
from tools.shards.convert import ConvertOptions, Outcome, convert, describe_plan, describe_source, make_plan
from tools.shards.images import VERIFY_LEVELS, ImagePolicy
from tools.shards.layouts.parquet import empty_spools
from tools.shards.layouts.source import LAYOUTS, open_source
from tools.shards.photographs import NUM_SHARDS, photograph_source
from tools.shards.report import REJECTED_NAME
from tools.shards.verify import index_split, split_folders, stats_split, verify_split
from tools.shards.writer import RECORD_FOLDER


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused with one line on stderr, 130 interrupted."""
    parsed = build_parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except (ValueError, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_shards: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample = commands.add_parser("sample", help="cut the quickstart's tiles from photographs in installed packages")
    sample.add_argument("--out", type=Path, default=Path("shards/sample"), help="default: %(default)s")
    sample.set_defaults(run=run_sample)
    add_convert(commands.add_parser("convert", help="turn a data set into verified, indexed shards"))
    for name, run, what in (
        ("verify", run_verify, "check sums, index and every image of finished shards"),
        ("stats", run_stats, "sizes, classes, duplicates, mean and std of shards"),
        ("index", run_index, "index a WebDataset that somebody else wrote"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("folder", type=Path, help="a folder of tars, or one with such folders in it")
        command.add_argument("--workers", type=positive, default=num_cores(), help="processes, default: the cores")
        command.set_defaults(run=run)
    return parser


def add_convert(command: argparse.ArgumentParser) -> None:
    policy, options = ImagePolicy(), ConvertOptions()
    command.add_argument(
        "source", type=Path, help="a folder of images, of class folders or of tars; a tar; or a data set as downloaded"
    )
    command.add_argument("--out", type=Path, required=True, help="the shards go to OUT/SPLIT")
    command.add_argument("--split", choices=("train", "val"), default="train")
    command.add_argument(
        "--val-ratio", type=float, default=0.0, metavar="R", help="set this share of every class aside as OUT/val"
    )
    command.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto")
    command.add_argument("--seed", type=int, default=options.seed, help="of the shuffle")
    command.add_argument("--num-shards", type=positive, default=0, help="default: 256 MiB or 10,000 images each")
    command.add_argument("--resize", type=positive, default=0, metavar="PIXELS", help="shorter side, never enlarged")
    command.add_argument(
        "--quality", type=int, choices=range(1, 101), metavar="1..100", help="of resized JPEGs, default 90"
    )
    command.add_argument("--verify", choices=VERIFY_LEVELS, default=policy.verify, help="default: %(default)s")
    command.add_argument("--max-pixels", type=positive, default=policy.max_pixels, help="default: %(default)s")
    command.add_argument("--max-bytes", type=positive, default=policy.max_bytes, help="per image, default: %(default)s")
    command.add_argument(
        "--max-bad-fraction", type=float, default=options.max_bad_fraction, help="default: %(default)s"
    )
    command.add_argument("--workers", type=positive, default=num_cores(), help="processes, default: the cores")
    command.add_argument("--task-index", type=int, default=0, help="of a job array, from 0")
    command.add_argument("--num-tasks", type=positive, default=1, help="size of the job array")
    command.add_argument("--official", action="store_true", help="check the md5 of the official archives first")
    command.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    command.set_defaults(run=run_convert)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def run_convert(parsed: argparse.Namespace) -> None:
    options = convert_options(parsed)
    if parsed.official:
        with notify_after(2, f"taking the md5 of {parsed.source} ..."):
            print(f"md5 as published: {', '.join(check_official(parsed.source))}")
    spools = parsed.out / parsed.split / RECORD_FOLDER / "spool"
    with notify_after(2, f"listing the images of {parsed.source} ..."):
        source = open_source(parsed.source, parsed.split, parsed.layout, None if parsed.dry_run else spools)
        check_apart(source, parsed.out)
        parts = {parsed.split: source}
        if parsed.val_ratio:
            parts["train"], parts["val"] = hold_out(source, parsed.val_ratio, parsed.seed)
    print("\n".join(describe_source(source)), flush=True)
    if parsed.dry_run:
        for split, part in parts.items():
            print("\n".join(describe_plan(make_plan(part, parsed.out / split, split, options), options)))
        return
    outcomes = []
    for split, part in parts.items():
        start, folder = time.perf_counter(), parsed.out / split
        outcomes.append(convert(part, folder, split, options))
        report(folder, len(part.catalogue), outcomes[-1], time.perf_counter() - start)
    if all(outcome.complete for outcome in outcomes):
        empty_spools(spools)


def check_apart(source: Source, out: Path) -> None:
    """Raise ValueError when the shards would lie among the images: the next call would take their folder for a class."""
    for container in source.catalogue.containers:
        if isinstance(container, LooseFiles) and out.resolve().is_relative_to(container.root.resolve()):
            raise ValueError(f"--out {out} lies in {container.root}, which is read: choose a folder beside it")


def convert_options(parsed: argparse.Namespace) -> ConvertOptions:
    """Rules between options. Raises ValueError for one that would have no effect."""
    if parsed.quality and not parsed.resize:
        raise ValueError("--quality has no effect without --resize: images keep their bytes")
    if not 0 <= parsed.val_ratio < 1 or (parsed.val_ratio and parsed.split == "val"):
        raise ValueError(
            f"--val-ratio {parsed.val_ratio} --split {parsed.split}: a share below 1 of a train split is needed"
        )
    if not 0 <= parsed.task_index < parsed.num_tasks:
        raise ValueError(
            f"--task-index {parsed.task_index} is outside 0..{parsed.num_tasks - 1} (--num-tasks {parsed.num_tasks})"
        )
    if not 0 <= parsed.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction {parsed.max_bad_fraction} is outside 0..1")
    quality = parsed.quality or ImagePolicy().quality
    policy = ImagePolicy(parsed.verify, parsed.resize, quality, parsed.max_pixels, parsed.max_bytes)
    return ConvertOptions(
        seed=parsed.seed,
        num_shards=parsed.num_shards,
        policy=policy,
        max_bad_fraction=parsed.max_bad_fraction,
        workers=parsed.workers,
        task_index=parsed.task_index,
        num_tasks=parsed.num_tasks,
    )


def run_verify(parsed: argparse.Namespace) -> int:
    problems = []
    for folder in split_folders(parsed.folder):
        found = verify_split(folder, parsed.workers)
        print(f"{folder}: {'whole' if not found else f'{len(found)} problems'}")
        problems += found
    for line in problems:
        print(f"make_shards: {line}", file=sys.stderr)
    return 2 if problems else 0


def run_index(parsed: argparse.Namespace) -> None:
    for folder in split_folders(parsed.folder):
        print(f"{folder}: {index_split(folder, parsed.workers):,} samples indexed")


def run_stats(parsed: argparse.Namespace) -> None:
    for folder in split_folders(parsed.folder):
        print(f"{folder}:")
        for name, value in stats_split(folder, parsed.workers).items():
            print(f"  {name:16} {shorten(value)}")


def shorten(value: Any) -> str:
    """A figure, or a dictionary of figures on one line, the first twelve of them."""
    if not isinstance(value, dict):
        return str(value)
    parts = [f"{key} {number}" for key, number in value.items() if key != "first_groups"]
    return ", ".join(parts[:12]) + (f", ... ({len(parts)} in all)" if len(parts) > 12 else "")


def run_sample(parsed: argparse.Namespace) -> None:
    for split, num_shards in NUM_SHARDS.items():
        start = time.perf_counter()
        source = photograph_source(split)
        outcome = convert(source, parsed.out / split, split, ConvertOptions(num_shards=num_shards, max_bad_fraction=0))
        report(parsed.out / split, len(source.catalogue), outcome, time.perf_counter() - start)


def report(folder: Path, num_images: int, outcome: Outcome, seconds: float) -> None:
    if not outcome.changed:
        print(f"{folder}: already complete and whole, nothing to do")
    elif not outcome.complete:
        print(f"{folder}: this task's {outcome.written} shards are written; other tasks are still to run")
    else:
        left_out = f", {outcome.left_out:,} bad ones left out ({folder / REJECTED_NAME})" if outcome.left_out else ""
        images = f"{num_images - outcome.left_out:,} images"
        print(f"{folder}: {images}, {outcome.written} shards written in {seconds:.1f} s{left_out}")


if __name__ == "__main__":
    sys.exit(main())
