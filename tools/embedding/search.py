"""Questions that vectors answer: which images are nearly the same, which are nearest, which class the rest has."""

import base64
import csv
import io
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.shards.converted import converted
from pipeline.shards.index import UNLABELLED
from pipeline.text import plural, truncate_list
from tools.embedding.encode import Embeddings, ImageEncoder, encode
from tools.shards.labels import read_labels
from tools.shards.verify import split_folders
from train.evaluation.measure import nearest_neighbours
from train.output.pictures import open_picture
from train.output.report import write_html

MAX_NEAREST = 32  # images that one image is compared with for duplicates
THUMBNAIL, MAX_GROUPS, MAX_UNSURE, NUM_NEAREST = 112, 200, 60, 10
CPU = torch.device("cpu")


def duplicate_groups(vectors: np.ndarray, threshold: float) -> list[tuple[list[int], float]]:
    """Return rows of `[N, D]` in chains of cosine similarities from `threshold` up, with the smallest along each; best first."""
    points = torch.from_numpy(vectors)
    similarity, nearest = (part.numpy() for part in nearest_neighbours(points, points, min(MAX_NEAREST, len(points)), CPU))
    first, rank = np.nonzero((similarity >= threshold) & (nearest != np.arange(len(points))[:, None]))
    graph = coo_array((np.ones(len(first)), (first, nearest[first, rank])), shape=(len(points), len(points)))
    _, group = connected_components(graph, directed=False)
    values, groups = similarity[first, rank], group[first]
    found = [(np.flatnonzero(group == number).tolist(), float(values[groups == number].min())) for number in np.unique(groups)]
    return sorted(found, key=lambda pair: -pair[1])


def find_row(names: np.ndarray, wanted: str) -> int:
    """Return the row of a file, named in full or by a unique end of its path. Raises ValueError for one that is not there."""
    found = [row for row, name in enumerate(names.tolist()) if name == wanted or name.endswith(f"/{wanted}")]
    if len(found) != 1:
        examples = truncate_list(names[found or slice(3)].tolist())
        raise ValueError(f"{wanted}: {'several images' if found else 'no image'} of that name; for example {examples}")
    return found[0]


def predict(vectors: np.ndarray, labels: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable class `[N]` of each image and its probability `[N]`, 0..1, by logistic regression."""
    from sklearn.linear_model import LogisticRegression

    points = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    points = (points - points.mean(axis=0)) / max(float(points.std()), 1e-12)  # its default regularisation suits this scale
    rows = list(labels)
    model = LogisticRegression(max_iter=1000).fit(points[rows], [labels[row] for row in rows])
    chances = model.predict_proba(points)
    return model.classes_[chances.argmax(axis=1)], chances.max(axis=1)


def show_duplicates(out: Path, features: Embeddings, threshold: float) -> None:
    groups = duplicate_groups(features.vectors, threshold)
    extra = plural(sum(len(rows) - 1 for rows, _ in groups), "image")
    rows = [(f"{weakest:.4f}", [picture(features, row) for row in group]) for group, weakest in groups[:MAX_GROUPS]]
    text = f"{plural(len(groups), 'group')} of similar images (cosine {threshold} or more), {extra} to spare"
    write_page(out.with_suffix(".duplicates.html"), "Near-duplicates", text, rows)


def show_neighbours(out: Path, features: Embeddings, queries: Sequence[str], encoder: ImageEncoder) -> None:
    rows, vectors = [], torch.from_numpy(features.vectors)
    with tempfile.TemporaryDirectory() as scratch:
        for number, query in enumerate(queries):
            if Path(query).is_file():  # it goes the way of all others, so that its pixels are made alike
                folder, place = Path(scratch) / str(number), 0
                (folder / "query").mkdir(parents=True)
                shutil.copy(query, folder / "query")
                asked = encode(encoder, split_folders(converted(folder / "query", folder)), folder / "work", 1, False)
            else:
                asked, place = features, find_row(features.names, query)
            similar, near = nearest_neighbours(vectors, torch.from_numpy(asked.vectors[[place]]), NUM_NEAREST + 1, CPU)
            nearest = zip(near[0].tolist(), similar[0].tolist(), strict=True)
            found = [(row, value) for row, value in nearest if asked is not features or row != place][:NUM_NEAREST]
            print(f"{query}: {', '.join(f'{features.names[row]} {value:.3f}' for row, value in found)}")
            others = [picture(features, row, f"{features.names[row]} {value:.3f}") for row, value in found]
            rows.append(("", [picture(asked, place, query), *others]))
    write_page(out.with_suffix(".neighbours.html"), "Nearest images", "The query is first.", rows)


def show_predictions(out: Path, features: Embeddings, few: Path) -> None:
    given, note = read_labels(few, features.names.tolist())
    labels = {row: str(label) for row, label in enumerate(given) if label != UNLABELLED}
    if len(set(labels.values())) < 2:
        raise ValueError(f"{few}: {note}, all of one class; label some of two or more classes")
    classes, chances = predict(features.vectors, labels)
    table = out.with_suffix(".labels.csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerow(("name", "label", "confidence"))
        csv.writer(file).writerows(zip(features.names, classes, (f"{chance:.4f}" for chance in chances), strict=True))
    print(f"{table}: {plural(len(classes), 'label')}, learned from {len(labels)}")
    unsure = [row for row in chances.argsort().tolist() if row not in labels][:MAX_UNSURE]
    pictures = [picture(features, row, f"{classes[row]} {chances[row]:.2f}, {features.names[row]}") for row in unsure]
    text = f"{plural(len(labels), 'label')} given; these are the least sure of the others: label some of them and run it again"
    write_page(out.with_suffix(".labels.html"), "Least sure", text, [("", pictures)])


def picture(features: Embeddings, row: int, caption: str = "") -> str:
    """Return a small picture over its caption, by default its name, as HTML."""
    (index, stored), file = features.places[row], io.BytesIO()
    small = open_picture(index.encoded(stored))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=85)
    source, text = base64.b64encode(file.getvalue()).decode(), escape(caption or features.names[row])
    return f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><span>{text}</span></figure>'


def write_page(path: Path, title: str, text: str, rows: Iterable[tuple[str, list[str]]]) -> None:
    """Write a page with rows of pictures, each under a caption."""
    groups = (f'<h3>{escape(caption)}</h3><div class="thumbs">{"".join(pictures)}</div>' for caption, pictures in rows)
    print(f"wrote {write_html(path, title, [f'<p>{escape(text)}</p>', *groups])}")
