"""Draw the crops, boxes and masks of any config: `python tools/preview.py CONFIG [--epoch E] [--position P]`.

It draws what training sees there: crops are a function of (shards, seed, epoch, position), and a step's masks of (seed, step,
rank). For the same bits, run it on the kind of device that training uses.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.shards.index import split_folder
from train.command import run_command
from train.config.load import load_config
from train.output.display import LOADING


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preview", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="The YAML file of a run.")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="Settings that replace those of the file."
    )
    parser.add_argument("--epoch", type=int, default=0, help="The epoch, counted from 0, which is the default.")
    parser.add_argument(
        "--position", type=int, default=0, help="The first sample's place in the epoch. The default is 0."
    )
    parser.add_argument("--count", type=int, default=2, help="How many samples to draw. The default is %(default)s.")
    parser.add_argument(
        "--world-size", type=int, default=1, help="The ranks of the training run. The default is %(default)s."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("preview.png"),
        metavar="PNG",
        help="The picture to write. The default is %(default)s.",
    )
    return parser.parse_intermixed_args(arguments)


def preview(given: argparse.Namespace) -> None:
    config = load_config(given.config, given.overrides)
    split_folder(config.data.dataset, config.data.data_path, "train")
    print(LOADING, file=sys.stderr)  # only now: a wrong setting is reported at once
    from train.output.pictures import draw_sheet
    from train.replay import replay

    seen = replay(config, given.epoch, given.position, given.count, given.world_size)
    draw_sheet(given.out, seen)
    print(*seen.captions, f"wrote {given.out}", sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_arguments(arguments)
    return run_command("preview", lambda: preview(given))


if __name__ == "__main__":
    sys.exit(main())
