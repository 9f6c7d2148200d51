"""Draw the crops, boxes and masks of any config: `python tools/preview.py CONFIG [--epoch E] [--position P]`.

It draws what training sees there: crops are a function of (shards, seed, epoch, position), and a step's masks of (seed, step,
rank). For the same bits, run it on the kind of device that training uses.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.text import printable, say
from train.command import SETTING, CommandParser, path_argument, run_command
from train.config.load import load_config
from train.output.display import LOADING
from train.shards import with_shards

if TYPE_CHECKING:
    from train.replay import Replay

SOURCE_SIDE = 400  # pixels


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="preview", description=(__doc__ or "").splitlines()[0])
    add, default = parser.add_argument, "The default is %(default)s."
    add("config", type=path_argument, help="The YAML file of a run.")
    add("overrides", nargs="*", metavar=SETTING, help="Settings that replace those of the file.")
    add("--epoch", type=int, default=0, help=f"The epoch, counted from 0. {default}")
    add("--position", type=int, default=0, help=f"The first sample's position in the epoch. {default}")
    add("--count", type=int, default=2, help=f"The number of samples to draw, of one batch. {default}")
    add("--world-size", type=int, default=1, help=f"The number of ranks of the training run. {default}")
    add("--out", type=path_argument, default=Path("preview.png"), metavar="PNG", help=f"The picture to write. {default}")
    return parser.parse_intermixed_args(arguments)


def preview(args: argparse.Namespace) -> None:
    config = with_shards(load_config(args.config, args.overrides))
    print(LOADING, file=sys.stderr)  # imports start here, so that a wrong setting is reported at once
    from train.replay import replay

    replayed = replay(config, args.epoch, args.position, args.count, args.world_size)
    draw_sheet(args.out, replayed)
    say("\n".join((*map(printable, replayed.captions), f"wrote {args.out}")))


def draw_sheet(path: Path, replayed: "Replay") -> None:
    """Draw a band per sample: its source with the boxes, its crops, the masks of its globals; each view has its own colour."""
    from train.output import pictures

    dataset, plan = replayed.dataset, replayed.masks
    num_global = plan.context.shape[1]
    views = pictures.Views(replayed.batch, num_global, dataset.mean, dataset.std)
    rows = []
    for i, (row, caption) in enumerate(zip(replayed.rows, replayed.captions, strict=True)):
        source = pictures.source_tile(views, i, dataset.index.encoded(row), SOURCE_SIDE, " (dashed: flipped)")
        masks = [pictures.mask_tiles(views, plan, i, g, replayed.grid, replayed.strides) for g in range(num_global)]
        rows += [[pictures.text_line(caption)], [source, pictures.join_rows([pictures.crop_tiles(views, i), *masks])]]
    pictures.save_rows(path, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return run_command("preview", lambda: preview(args))


if __name__ == "__main__":
    sys.exit(main())
