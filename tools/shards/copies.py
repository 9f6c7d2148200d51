"""Finds images that are equal or nearly so, such as bursts and resized copies, which must not lie on both sides of a split."""

import hashlib
import io

import numpy as np
from PIL import Image
from rich.console import Console

from pipeline.shards.index_file import FAULTS
from tools.own_process import in_parallel
from tools.shards.catalogue import Catalogue
from tools.shards.decoding.pixels import to_8_bit
from tools.shards.formats import FORMATS
from tools.shards.images import ImagePolicy
from train.output.display import ProgressDisplay

SIDE, LENGTH = 16, 4096  # an image is reduced to SIDE x SIDE gray values of mean 0, as integers of this length
MIN_SIMILARITY = 0.99  # the cosine of two reductions
# Standard deviation, in gray levels, of what a plane leaves of a reduction. Plain images and gradients, all alike, have less.
MIN_DETAIL = 5.0
PASSES, KEY_BITS, NEAREST = 8, 64, 4  # of the search: sorts by different keys, and the neighbours in each that are compared
ROWS_PER_TASK, ROWS_AT_ONCE = 64, 1 << 15
PLANE = np.linalg.qr(np.stack([np.ones(SIDE**2), *(axis.ravel() for axis in np.mgrid[:SIDE, :SIDE])], axis=1))[0]


def fingerprint(content: bytes) -> tuple[bytes, np.ndarray]:
    """Return the digest of a file and its reduction `[256]` int16: zeros without detail, and for what does not decode."""
    reduced = np.zeros(SIDE**2)
    try:
        with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
            if image.width * image.height <= ImagePolicy().max_pixels:
                image.draft("L", (4 * SIDE, 4 * SIDE))  # decodes a large JPEG at an eighth of its size
                pixels, _ = to_8_bit(image)
                reduced = np.asarray(pixels.convert("F").resize((SIDE, SIDE), Image.Resampling.BILINEAR), float).ravel()
    except FAULTS:
        pass  # the conversion names it
    centred = reduced - reduced.mean()
    has_detail = (centred - PLANE @ (PLANE.T @ centred)).std() >= MIN_DETAIL
    scale = LENGTH / np.linalg.norm(centred) if has_detail else 0.0
    return hashlib.sha256(content).digest(), np.rint(centred * scale).astype(np.int16)


def group_copies(catalogue: Catalogue, workers: int) -> np.ndarray:
    """Return `[N]`: for each image the first one of its group. Reads and decodes all images, in `workers` processes."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def fingerprints(start: int) -> list[tuple[bytes, np.ndarray]]:
        return [fingerprint(catalogue.read(row)) for row in range(start, min(start + ROWS_PER_TASK, len(catalogue)))]

    digests, reductions = list[bytes](), np.zeros((len(catalogue), SIDE**2), np.int16)
    with ProgressDisplay(Console(stderr=True), "comparing", "image", len(catalogue), transient=True) as progress:
        for part in in_parallel(workers, fingerprints, range(0, len(catalogue), ROWS_PER_TASK)):
            for digest, reduction in part:
                reductions[len(digests)] = reduction
                digests.append(digest)
            progress.show(len(digests), "search for copies")
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(digest, row) for row, digest in enumerate(digests)])
    one, other = np.concatenate([np.stack([np.arange(len(first)), first]), similar_pairs(reductions, np.unique(first))], axis=1)
    graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(len(first), len(first)))
    _, group = connected_components(graph, directed=False)
    return np.unique(group, return_index=True)[1][group]


def similar_pairs(reductions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return `[2, P]`: pairs of `rows` of `reductions` `[N, 256]` int16 whose cosine is at least MIN_SIMILARITY.

    Each pass sorts the images by the signs of 64 projections, which similar ones mostly share, and compares neighbours: the time
    grows as N log N. All sums are of integers, so that every processor finds the same pairs.
    """
    rows = rows[reductions[rows].any(axis=1)]
    num_parts, pairs = len(rows) // ROWS_AT_ONCE + 1, [np.zeros((2, 0), int)]
    for number in range(PASSES):
        draws = np.random.Philox(key=number).random_raw(SIDE**2 * KEY_BITS).reshape(SIDE**2, KEY_BITS)
        signs = np.where(draws & 1, np.float32(1), np.float32(-1))
        bits = (reductions[part].astype(np.float32) @ signs > 0 for part in np.array_split(rows, num_parts))
        keys = np.concatenate([np.packbits(part, axis=1).view(">u8")[:, 0] for part in bits])
        order = rows[np.argsort(keys, kind="stable")]
        for apart in range(1, NEAREST + 1):
            neighbours = np.stack([order[:-apart], order[apart:]])
            for one, other in np.array_split(neighbours, num_parts, axis=1):
                cosine = np.einsum("nd,nd->n", reductions[one], reductions[other], dtype=np.int32) / LENGTH**2
                pairs.append(np.stack([one, other])[:, cosine >= MIN_SIMILARITY])
    return np.concatenate(pairs, axis=1)
