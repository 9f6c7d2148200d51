"""The order of samples in DALI's terms: an index file may drop, permute and repeat the members of a tar."""

import os
from pathlib import Path

import numpy as np

from pipeline.shards.cache import Pins
from pipeline.shards.index import ShardIndex

IMAGE = "img"  # the component's name in DALI's index files


def write_dali_indices(
    index: ShardIndex, rows: np.ndarray, folder: Path, pins: Pins | None = None
) -> tuple[list[str], list[str]]:
    """Write rows of the index, in their order, as DALI index files in `folder`.

    Returns the tars and their index files; a tar is listed once for each run of its rows. Tars of a store are read through
    their links in `pins`.
    """
    samples = index.samples[rows]
    breaks = np.flatnonzero(np.diff(samples["shard"])) + 1
    tars: list[str] = []
    names: list[str] = []
    for part, run in zip(np.split(rows, breaks), np.split(samples, breaks), strict=True):
        lines = [
            f"{IMAGE} {offset} {size} {row}.{IMAGE}"
            for row, offset, size in zip(part.tolist(), run["offset"].tolist(), run["size"].tolist(), strict=True)
        ]
        path = folder / f"{len(tars):06d}.idx"
        path.write_text(f"v1.2 {len(lines)}\n" + "\n".join(lines) + "\n")
        tar = index.shard_path(run["shard"][0])
        tars.append(os.fspath(tar if pins is None else pins.folder / tar.name))
        names.append(os.fspath(path))
    return tars, names
