"""Use an encoder: `python tools/embed.py EXPORT_OR_RUN SOURCE --out features.npz`, and what vectors are good for.

SOURCE is a folder of pictures, shards, or any data set that `make_shards.py convert` reads. Each question writes a page next to
the vectors, one self-contained HTML file. The same command continues a stopped pass, and does not repeat a finished one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.shards.converted import CACHE, converted
from pipeline.text import plural
from tools.shards.verify import split_folders
from train.command import CommandParser, count_argument, device_argument, path_argument, run_command, show_messages
from train.output.display import LOADING

FORMATS = (".npz", ".parquet")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "The default is %(default)s."
    add("model", type=path_argument, metavar="EXPORT_OR_RUN", help="The folder of an export, a run or a checkpoint.")
    add("source", type=path_argument, help="Pictures, shards, or a data set; converted once into a cache where needed.")
    add("--out", type=path_argument, default=Path("features.npz"), help=f"The file to write, .npz or .parquet. {default}")
    add("--tokens", action="store_true", help="Write the vectors of all patches too (float16).")
    add("--cache", type=path_argument, default=CACHE, metavar="DIR", help=f"Where converted images are kept. {default}")
    add("--batch-size", type=count_argument, default=64, metavar="N", help=f"Images at a time. {default}")
    add("--device", type=device_argument, choices=("auto", "cpu", "gpu"), default="auto", help=f"Where to compute. {default}")
    add = parser.add_argument_group("questions").add_argument
    add("--duplicates", type=float, nargs="?", const=0.98, metavar="SIMILARITY",
        help="Show groups of images at least this similar (cosine; 0.98 where none is given).")  # fmt: skip
    add("--neighbours", nargs="+", metavar="QUERY", help="Show the nearest images of these, each a name in SOURCE or a file.")
    add("--few-labels", type=path_argument, metavar="CSV",
        help="Learn from lines name,label: write a label and its probability for each image; show the least sure.")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.out.suffix not in FORMATS:
        parser.error(f"--out {args.out}: ends with {' or '.join(FORMATS)}")
    return args


def embed(args: argparse.Namespace) -> None:
    show_messages()
    try:
        folders = split_folders(args.source)
    except (FileNotFoundError, NotADirectoryError):  # no shards
        folders = split_folders(converted(args.source, args.cache))
    print(LOADING, file=sys.stderr)
    from tools.embedding.encode import ImageEncoder, encode
    from tools.embedding.search import show_duplicates, show_neighbours, show_predictions

    encoder, work = ImageEncoder(args.model, args.device), args.out.with_name(f".{args.out.name}.work")
    features = encode(encoder, folders, work, args.batch_size, args.tokens)
    features.write(args.out)
    tokens = "" if features.tokens is None else f" and {features.tokens.shape[1]} patch tokens each"
    print(f"{args.out}: {plural(len(features.names), 'vector')} of {features.vectors.shape[1]} numbers{tokens}")
    if args.duplicates is not None:
        show_duplicates(args.out, features, args.duplicates)
    if args.neighbours:
        show_neighbours(args.out, features, args.neighbours, encoder)
    if args.few_labels:
        show_predictions(args.out, features, args.few_labels)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return run_command("embed", lambda: embed(args), "interrupted; the same command continues where it stopped")


if __name__ == "__main__":
    sys.exit(main())
