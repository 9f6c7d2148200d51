"""Make, check and describe shards: `python tools/make_shards.py {sample,convert,index,verify,stats} --help`."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.shards.object_store import is_remote
from pipeline.shards.storage import join
from pipeline.text import notify_after
from tools.shards.archives import check_official
from tools.shards.catalogue import LooseFiles, Source, hold_out
from tools.shards.classes import with_classes_beside
from tools.shards.convert import (
    ConvertOptions,
    ConvertResult,
    assign_images,
    convert,
    describe_conversion,
    describe_source,
)
from tools.shards.images import VERIFY_LEVELS, ImagePolicy
from tools.shards.layouts.parquet import delete_spools
from tools.shards.layouts.source import LAYOUTS, open_source
from tools.shards.photographs import NUM_SHARDS, photograph_source
from tools.shards.report import REJECTED_NAME
from tools.shards.upload import staging_folder, upload_split
from tools.shards.verify import index_split, split_folders, stats_split, verify_split
from tools.shards.writer import RECORD_FOLDER
from train.command import BAD_INPUT, run_command, show_messages


def main(arguments: list[str] | None = None) -> int:
    parsed = build_parser().parse_args(arguments)
    show_messages()
    interrupted = "interrupted; the same command continues where it stopped"
    return run_command("make_shards", lambda: parsed.run(parsed), interrupted)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample = commands.add_parser("sample", help="Cut the quickstart's tiles from photographs in installed packages.")
    sample.add_argument(
        "--out", type=Path, default=Path("shards/sample"), help="The folder. The default is %(default)s."
    )
    sample.set_defaults(run=run_sample)
    add_convert(commands.add_parser("convert", help="Turn a data set into verified, indexed shards."))
    for name, run, text in (
        ("verify", run_verify, "Check the checksums, index and every image of finished shards."),
        ("stats", run_stats, "Print sizes, classes, duplicates, mean and std of shards."),
        ("index", run_index, "Index a WebDataset from another writer."),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, help="A folder of tars, or a folder of such folders.")
        command.add_argument(
            "--workers", type=positive, default=num_cores(), help="Processes. The default is one per core."
        )
        command.set_defaults(run=run)
    return parser


def add_convert(command: argparse.ArgumentParser) -> None:
    policy, options, default = ImagePolicy(), ConvertOptions(), "The default is %(default)s."
    command.add_argument(
        "source", type=Path,
        help="A folder of images, of class folders or of tars, a tar, parquet files, or a data set as it was downloaded.",
    )  # fmt: skip
    add = command.add_argument_group("what is written where").add_argument
    add("--out", type=place, required=True, help="A folder, or a prefix such as s3://B/P. The shards go to OUT/SPLIT.")
    add(
        "--staging", type=Path, metavar="DIR",
        help="For --out in a store: the shards are first written here. By default to a folder in $TMPDIR, deleted after.",
    )  # fmt: skip
    add("--num-shards", type=positive, default=0, help="How many. By default of 256 MiB or 10,000 images each.")
    add("--seed", type=int, default=options.seed, help=f"The seed of the shuffle. {default}")
    add("--dry-run", action="store_true", help="Print what would be done, and write nothing.")
    add = command.add_argument_group("what is read").add_argument
    add("--split", choices=("train", "val"), default="train", help=f"The split to convert. {default}")
    add("--val-ratio", type=float, default=0.0, metavar="R", help="Hold out this share of every class as OUT/val.")
    add(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="How the source is read. By default it is detected.",
    )
    add("--official", action="store_true", help="Check the md5 of the official archives first.")
    add = command.add_argument_group("what becomes of the images").add_argument
    add("--resize", type=positive, default=0, metavar="PIXELS", help="Reduce the shorter side to this; never enlarge.")
    add(
        "--quality", type=int, choices=range(1, 101), metavar="1..100",
        help=f"The quality of resized JPEGs. The default is {policy.quality}.",
    )  # fmt: skip
    add("--verify", choices=VERIFY_LEVELS, default=policy.verify, help=f"How far each image is decoded. {default}")
    add("--max-pixels", type=positive, default=policy.max_pixels, help=f"Reject larger images. {default}")
    add("--max-bytes", type=positive, default=policy.max_bytes, help=f"Reject larger files. {default}")
    add(
        "--max-bad-fraction",
        type=float,
        default=options.max_bad_fraction,
        help=f"Stop when more are rejected. {default}",
    )
    add = command.add_argument_group("how the work is shared").add_argument
    add("--workers", type=positive, default=num_cores(), help="Processes. The default is one per core.")
    add("--task-index", type=int, default=0, help="This task's number in a job array, from 0.")
    add("--num-tasks", type=positive, default=1, help="The size of the job array. The default is 1: no array.")
    command.set_defaults(run=run_convert)


def place(text: str) -> Path | str:
    """A folder, or the prefix of a store."""
    return text if is_remote(text) else Path(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def run_convert(parsed: argparse.Namespace) -> None:
    options, store = convert_options(parsed), parsed.out if is_remote(parsed.out) else None
    if store:
        parsed.out = staging_folder(store, parsed.staging, parsed.num_tasks)
    if parsed.official:
        with notify_after(2, f"computing the md5 of {parsed.source} ..."):
            print(f"official md5: {', '.join(check_official(parsed.source))}")
    spools = parsed.out / parsed.split / RECORD_FOLDER / "spool"
    with notify_after(2, f"listing the images of {parsed.source} ..."):
        source = open_source(parsed.source, parsed.split, parsed.layout, None if parsed.dry_run else spools)
        check_apart(source, parsed.out)
        parts = {parsed.split: source}
        if parsed.val_ratio:
            parts["train"], parts["val"] = hold_out(source, parsed.val_ratio, parsed.seed)
        parts = {split: with_classes_beside(part, parsed.out, split) for split, part in parts.items()}
    print("\n".join(describe_source(parts[parsed.split])), flush=True)
    if parsed.dry_run:
        for split, part in parts.items():
            print("\n".join(describe_conversion(assign_images(part, parsed.out / split, split, options), options)))
        return
    results = [convert_and_report(part, parsed.out / split, split, options) for split, part in parts.items()]
    if all(result.complete for result in results):
        delete_spools(spools)
        if store:
            upload_and_report(parsed, store, list(parts))


def upload_and_report(parsed: argparse.Namespace, store: str, splits: list[str]) -> None:
    for split in splits:
        url = join(store, split)
        written = upload_split(parsed.out / split, url)
        print(f"{url}: {f'{written} files uploaded' if written else 'already complete'}")
    if parsed.staging is None:
        for split in splits:
            shutil.rmtree(parsed.out / split)


def check_apart(source: Source, out: Path) -> None:
    """Raise ValueError when the shards would lie among the images: the next call would take their folder for a class."""
    for container in source.catalogue.containers:
        if isinstance(container, LooseFiles) and out.resolve().is_relative_to(container.root.resolve()):
            raise ValueError(f"--out {out} is inside the source {container.root}: choose a folder outside it")


def convert_options(parsed: argparse.Namespace) -> ConvertOptions:
    """Rules between options. Raises ValueError for one that would have no effect."""
    if parsed.quality and not parsed.resize:
        raise ValueError("--quality has no effect without --resize: images keep their bytes")
    ratio, task, num_tasks, fraction = parsed.val_ratio, parsed.task_index, parsed.num_tasks, parsed.max_bad_fraction
    if not 0 <= ratio < 1 or (ratio and parsed.split == "val"):
        raise ValueError(f"--val-ratio {ratio} --split {parsed.split}: needs a share below 1 and the train split")
    if not 0 <= task < num_tasks:
        raise ValueError(f"--task-index {task} is outside 0..{num_tasks - 1} (--num-tasks {num_tasks})")
    if not 0 <= fraction <= 1:
        raise ValueError(f"--max-bad-fraction {fraction} is outside 0..1")
    quality = parsed.quality or ImagePolicy().quality
    policy = ImagePolicy(parsed.verify, parsed.resize, quality, parsed.max_pixels, parsed.max_bytes)
    return ConvertOptions(parsed.seed, parsed.num_shards, policy, fraction, parsed.workers, task, num_tasks)


def run_verify(parsed: argparse.Namespace) -> int:
    problems = []
    for folder in split_folders(parsed.folder):
        found = verify_split(folder, parsed.workers)
        print(f"{folder}: {f'{len(found)} problems' if found else 'no problems'}")
        problems += found
    for line in problems:
        print(f"make_shards: {line}", file=sys.stderr)
    return BAD_INPUT if problems else 0


def run_index(parsed: argparse.Namespace) -> None:
    for folder in split_folders(parsed.folder):
        print(f"{folder}: {index_split(folder, parsed.workers):,} samples indexed")


def run_stats(parsed: argparse.Namespace) -> None:
    for folder in split_folders(parsed.folder):
        print(f"{folder}:")
        for name, value in stats_split(folder, parsed.workers).items():
            print(f"  {name:16} {one_line(value)}")


def one_line(value: Any) -> str:
    """A number, or the first twelve numbers of a dictionary."""
    if not isinstance(value, dict):
        return str(value)
    parts = [f"{key} {number}" for key, number in value.items() if key != "first_groups"]
    return ", ".join(parts[:12]) + (f", ... ({len(parts)} in all)" if len(parts) > 12 else "")


def run_sample(parsed: argparse.Namespace) -> None:
    for split, num_shards in NUM_SHARDS.items():
        options = ConvertOptions(num_shards=num_shards, max_bad_fraction=0)
        convert_and_report(photograph_source(split), parsed.out / split, split, options)


def convert_and_report(source: Source, folder: Path, split: str, options: ConvertOptions) -> ConvertResult:
    start = time.perf_counter()
    result = convert(source, folder, split, options)
    seconds = time.perf_counter() - start
    if not result.changed:
        print(f"{folder}: already complete, nothing to do")
    elif not result.complete:
        print(f"{folder}: this task's {result.written} shards are written; other tasks have not finished")
    else:
        rejected = folder / REJECTED_NAME
        left_out = f", {result.left_out:,} bad images left out ({rejected})" if result.left_out else ""
        images = f"{len(source.catalogue) - result.left_out:,} images"
        print(f"{folder}: {images}, {result.written} shards written in {seconds:.1f} s{left_out}")
    return result


if __name__ == "__main__":
    sys.exit(main())
