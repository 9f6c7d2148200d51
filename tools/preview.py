"""Draw the crops, boxes and masks of any step: `python tools/preview.py CONFIG|RUN [--step N]`.

It draws what training sees there: crops are a function of (shards, seed, epoch, position), masks of (seed, step, place in the
batch). For the same bits, run it on the kind of device that training uses.

With a run's folder, it takes the step again, on any machine: it prints the losses next to the logged ones, and draws the images
with the largest losses. The weights are those of the last checkpoint before; with --exact the steps between are taken again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.text import printable, say
from train.command import SETTING, CommandParser, count_argument, path_argument, run_command, show_messages, write_json
from train.config.load import load_config
from train.output.display import LOADING
from train.output.log import read_metrics
from train.shards import with_shards

if TYPE_CHECKING:
    from train.replay import Replay, ReplayedImage

SOURCE_SIDE = 400  # pixels


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "The default is %(default)s."
    add("path", type=path_argument, metavar="CONFIG|RUN", help="The YAML file of a run, or its folder.")
    add("overrides", nargs="*", metavar=SETTING, help="Settings that replace those of the file.")
    add("--step", type=int, default=1, metavar="N", help=f"The step, counted from 1 as in metrics.jsonl. {default}")
    add("--count", type=count_argument, default=2, metavar="K", help=f"The number of images to draw. {default}")
    add("--exact", action="store_true", help="Of a run: take the steps since the last checkpoint again.")
    add("--world-size", type=count_argument, metavar="N", help="The number of ranks. By default that of the checkpoints, or 1.")
    add("--out", type=path_argument, default=Path("preview.png"), metavar="PNG", help=f"The picture to write. {default}")
    parser.add_json("the losses of the step and of each of its images")
    return parser.parse_intermixed_args(arguments)


def preview(args: argparse.Namespace) -> None:
    is_run, overrides = args.path.is_dir(), list(args.overrides)
    if is_run:
        run = args.path.resolve()
        overrides += [f"logging.run_dir={run.parent}", f"logging.run_name={run.name}"]
    config = with_shards(load_config(args.path / "config.yaml" if is_run else args.path, overrides))
    show_messages()
    print(LOADING, file=sys.stderr)  # imports start here, so that a wrong setting is reported at once
    from train.replay import replay_step

    replayed = replay_step(config, args.step, with_losses=is_run, exact=args.exact, world_size=args.world_size)
    images = sorted(replayed.images, key=lambda image: -image.score)  # stable: without losses they stay in order
    draw_sheet(args.out, replayed, images[: args.count])
    if args.json != "-":
        lines = losses_text(args.path, args.step, replayed) if is_run else []
        for image in images[: args.count]:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in image.losses.items())
            lines.append(printable(image.caption) + (f": loss {image.score:.6g} ({terms})" if is_run else ""))
        say("\n".join((*lines, f"wrote {args.out}")))
    if args.json is not None:
        each = [{"image": image.caption, "loss": image.score, **image.losses} for image in images]
        write_json(args.json, {"step": args.step, "weights": replayed.weights_step, "losses": replayed.losses, "images": each})


def losses_text(run: Path, step: int, replayed: "Replay") -> list[str]:
    """Return lines about the losses of a step, here and as the run has logged them."""
    logged = next((line for line in read_metrics(run) if line["step"] == step and "loss" in line), {})
    lines = [f"step {step} of {len(replayed.images)} images, with the weights after step {replayed.weights_step}"]
    for name, value in replayed.losses.items():
        lines.append(f"  {name:14} {value:.6g}" + (f", logged {logged[name]:.6g}" if name in logged else ""))
    mean = sum(image.score for image in replayed.images) / len(replayed.images)
    return [*lines, f"largest losses of an image, without SIGReg, which only a batch has; their mean is {mean:.6g}"]


def draw_sheet(path: Path, replayed: "Replay", images: Sequence["ReplayedImage"]) -> None:
    """Draw a band per image: its source with the boxes, its crops, the masks of its globals; each view has its own colour."""
    from train.output import pictures

    dataset, rows = replayed.dataset, []
    for image in images:
        num_global = image.masks.context.shape[1]
        views = pictures.Views(image.batch, num_global, dataset.mean, dataset.std)
        source = pictures.source_tile(views, 0, dataset.index.encoded(image.row), SOURCE_SIDE, " (dashed: flipped)")
        masks = [pictures.mask_tiles(views, image.masks, 0, g, replayed.grid, replayed.strides) for g in range(num_global)]
        rows += [[pictures.text_line(image.caption)], [source, pictures.join_rows([pictures.crop_tiles(views, 0), *masks])]]
    pictures.save_rows(path, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return run_command("preview", lambda: preview(args))


if __name__ == "__main__":
    sys.exit(main())
