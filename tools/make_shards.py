"""Make, check and describe shards: `python tools/make_shards.py {sample,convert,index,verify,stats} --help`."""

import argparse
import sys
import time
from pathlib import Path

from tools.convert import ConvertOptions, Outcome, convert
from tools.photographs import NUM_SHARDS, photograph_source


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
    return parser


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
        print(f"{folder}: {num_images:,} images, {outcome.written} shards written in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
