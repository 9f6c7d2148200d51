"""Questions that vectors answer: which images are nearly the same, which are nearest, which class the rest has."""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.text import truncate_list
from train.evaluation.measure import nearest_neighbours

MAX_NEAREST = 32  # images that one image is compared with for duplicates
CPU = torch.device("cpu")


def duplicate_groups(vectors: np.ndarray, threshold: float) -> list[tuple[list[int], float]]:
    """Return groups of rows whose vectors `[N, D]` are chains of cosine similarities from `threshold` up, the most similar first.

    Each comes with its smallest similarity along the chain; each image is compared with its 32 nearest.
    """
    points = torch.from_numpy(vectors)
    similarity, nearest = (part.numpy() for part in nearest_neighbours(points, points, min(MAX_NEAREST, len(points)), CPU))
    first, rank = np.nonzero(similarity >= threshold)
    second, values = nearest[first, rank], similarity[first, rank]
    first, second, values = (part[first != second] for part in (first, second, values))
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(points), len(points)))
    _, group = connected_components(graph, directed=False)
    weakest = np.full(group.max() + 1, np.inf)
    np.minimum.at(weakest, group[first], values)
    found = [np.flatnonzero(group == number) for number in np.flatnonzero(np.isfinite(weakest))]
    return sorted(((rows.tolist(), float(weakest[group[rows[0]]])) for rows in found), key=lambda pair: -pair[1])


def nearest_rows(vectors: np.ndarray, query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return the rows of `vectors` `[N, D]` nearest to `query` `[D]`, with their cosine similarities."""
    similarity, rows = nearest_neighbours(torch.from_numpy(vectors), torch.from_numpy(query[None]), count, CPU)
    return list(zip(rows[0].tolist(), similarity[0].tolist(), strict=True))


def find_row(names: np.ndarray, wanted: str) -> int:
    """Return the row of a file, named in full or by a unique end of its path. Raises ValueError for one that is not there."""
    found = [row for row, name in enumerate(names.tolist()) if name == wanted or name.endswith(f"/{wanted}")]
    if len(found) != 1:
        examples = truncate_list(names[found or slice(3)].tolist())
        raise ValueError(f"{wanted}: {'several images' if found else 'no image'} of that name; for example {examples}")
    return found[0]


def predict(vectors: np.ndarray, labels: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable class `[N]` of each image and its probability `[N]`, 0..1.

    A logistic regression on vectors of unit length, scaled so that its default regularisation suits them.
    """
    from sklearn.linear_model import LogisticRegression

    points = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    points = (points - points.mean(axis=0)) / max(float(points.std()), 1e-12)
    rows = list(labels)
    model = LogisticRegression(max_iter=1000).fit(points[rows], [labels[row] for row in rows])
    chances = model.predict_proba(points)
    return model.classes_[chances.argmax(axis=1)], chances.max(axis=1)
