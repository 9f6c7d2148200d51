"""Use an encoder: `python tools/embed.py EXPORT_OR_RUN SOURCE --out features.npz`, and what vectors are good for.

SOURCE is a folder of pictures, shards, or any data set that `make_shards.py convert` reads. Each question writes a page next to
the vectors, one self-contained HTML file. The same command continues a stopped pass, and does not repeat a finished one.
"""

import argparse
import base64
import csv
import io
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import partial_file
from pipeline.shards.converted import CACHE, converted
from pipeline.text import plural
from tools.shards.verify import split_folders
from train.command import CommandParser, device_argument, path_argument, run_command, show_messages
from train.output.display import LOADING

if TYPE_CHECKING:
    from tools.embedding.encode import Embeddings, ImageEncoder

FORMATS = (".npz", ".parquet")
THUMBNAIL, MAX_GROUPS, MAX_UNSURE, NUM_NEAREST = 112, 200, 60, 10


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "The default is %(default)s."
    add("model", type=path_argument, metavar="EXPORT_OR_RUN", help="The folder of an export, a run or a checkpoint.")
    add("source", type=path_argument, help="Pictures, shards, or a data set; converted once into a cache where needed.")
    add("--out", type=path_argument, default=Path("features.npz"), help=f"The file to write, .npz or .parquet. {default}")
    add("--tokens", action="store_true", help="Write the vectors of all patches too (float16).")
    add("--cache", type=path_argument, default=CACHE, metavar="DIR", help=f"Where converted images are kept. {default}")
    add("--batch-size", type=int, default=64, metavar="N", help=f"Images at a time. {default}")
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
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    return args


def embed(args: argparse.Namespace) -> None:
    show_messages()
    folders = shard_folders(args.source, args.cache)
    print(LOADING, file=sys.stderr)
    from tools.embedding.encode import ImageEncoder, encode

    encoder, work = ImageEncoder(args.model, args.device), args.out.with_name(f".{args.out.name}.work")
    features = encode(encoder, folders, work, args.batch_size, args.tokens)
    write_features(args.out, features)
    tokens = "" if features.tokens is None else f" and {features.tokens.shape[1]} patch tokens each"
    print(f"{args.out}: {plural(len(features.names), 'vector')} of {features.vectors.shape[1]} numbers{tokens}")
    if args.duplicates is not None:
        show_duplicates(args, features)
    if args.neighbours:
        show_neighbours(args, encoder, features)
    if args.few_labels:
        show_predictions(args, features)


def shard_folders(source: Path, cache: Path) -> list[Path]:
    """Return the folders of shards in `source`, or of those made from it."""
    try:
        return split_folders(source)
    except (FileNotFoundError, NotADirectoryError):
        return split_folders(converted(source, cache))


def write_features(out: Path, features: "Embeddings") -> None:
    """Write `name`, `label`, `vector` and, if there are any, `tokens` of every image."""
    import numpy as np

    columns = {"name": features.names, "label": features.labels, "vector": features.vectors}
    if features.tokens is not None:
        columns["tokens"] = features.tokens
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(out) as file:
        if out.suffix == ".npz":
            np.savez(file, **columns)  # type: ignore[arg-type]
            return
        import pyarrow  # type: ignore[import-not-found]
        from pyarrow import parquet

        lists = {key: list(value.reshape(len(value), -1)) if value.ndim > 1 else value for key, value in columns.items()}
        parquet.write_table(pyarrow.table(lists), file)


def show_duplicates(args: argparse.Namespace, features: "Embeddings") -> None:
    from tools.embedding.search import duplicate_groups

    groups = duplicate_groups(features.vectors, args.duplicates)
    extra = plural(sum(len(rows) - 1 for rows, _ in groups), "image")
    rows = [(f"{weakest:.4f}", [picture(features, row) for row in group]) for group, weakest in groups[:MAX_GROUPS]]
    text = f"{plural(len(groups), 'group')} of similar images (cosine {args.duplicates} or more), {extra} to spare"
    write_page(args.out.with_suffix(".duplicates.html"), "Near-duplicates", text, rows)


def show_neighbours(args: argparse.Namespace, encoder: "ImageEncoder", features: "Embeddings") -> None:
    from tools.embedding.search import find_row, nearest_rows

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, query in enumerate(args.neighbours):
            if Path(query).is_file():
                asked, place = embed_file(encoder, Path(query), Path(scratch) / str(number)), 0
            else:
                asked, place = features, find_row(features.names, query)
            nearest = nearest_rows(features.vectors, asked.vectors[place], NUM_NEAREST + 1)
            found = [(row, value) for row, value in nearest if asked is not features or row != place][:NUM_NEAREST]
            print(f"{query}: {', '.join(f'{features.names[row]} {value:.3f}' for row, value in found)}")
            near = [picture(features, row, f"{features.names[row]} {value:.3f}") for row, value in found]
            rows.append(("", [picture(asked, place, query), *near]))
    write_page(args.out.with_suffix(".neighbours.html"), "Nearest images", "The query is first.", rows)


def embed_file(encoder: "ImageEncoder", path: Path, folder: Path) -> "Embeddings":
    """Return the vector of one picture, which goes the way of all others, so that its pixels are made alike."""
    from tools.embedding.encode import encode

    (folder / "query").mkdir(parents=True)
    shutil.copy(path, folder / "query")
    return encode(encoder, split_folders(converted(folder / "query", folder)), folder / "work", 1, False)


def show_predictions(args: argparse.Namespace, features: "Embeddings") -> None:
    from pipeline.shards.index import UNLABELLED
    from tools.embedding.search import predict
    from tools.shards.labels import read_labels

    given, note = read_labels(args.few_labels, features.names.tolist())
    labels = {row: str(label) for row, label in enumerate(given) if label != UNLABELLED}
    if len(set(labels.values())) < 2:
        raise ValueError(f"{args.few_labels}: {note}, all of one class; label some of two or more classes")
    classes, chances = predict(features.vectors, labels)
    out = args.out.with_suffix(".labels.csv")
    with out.open("w", newline="") as file:
        csv.writer(file).writerow(("name", "label", "confidence"))
        csv.writer(file).writerows(zip(features.names, classes, (f"{chance:.4f}" for chance in chances), strict=True))
    print(f"{out}: {plural(len(classes), 'label')}, learned from {len(labels)}")
    unsure = [row for row in chances.argsort().tolist() if row not in labels][:MAX_UNSURE]
    pictures = [picture(features, row, f"{classes[row]} {chances[row]:.2f}, {features.names[row]}") for row in unsure]
    text = f"{plural(len(labels), 'label')} given; these are the least sure of the others: label some of them and run it again"
    write_page(args.out.with_suffix(".labels.html"), "Least sure", text, [("", pictures)])


def picture(features: "Embeddings", row: int, caption: str = "") -> str:
    """Return a small picture over its caption, by default its name, as HTML."""
    from train.output.pictures import open_picture

    small, file = open_picture(features.encoded(row)), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=85)
    source, text = base64.b64encode(file.getvalue()).decode(), escape(caption or features.names[row])
    return f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><span>{text}</span></figure>'


def write_page(path: Path, title: str, text: str, rows: Iterable[tuple[str, list[str]]]) -> None:
    """Write a page with rows of pictures, each under a caption."""
    from train.output.report import write_html

    groups = (f'<h3>{escape(caption)}</h3><div class="thumbs">{"".join(pictures)}</div>' for caption, pictures in rows)
    print(f"wrote {write_html(path, title, [f'<p>{escape(text)}</p>', *groups])}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return run_command("embed", lambda: embed(args), "interrupted; the same command continues where it stopped")


if __name__ == "__main__":
    sys.exit(main())
