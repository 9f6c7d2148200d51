"""The order of samples in DALI's terms: an index file may drop, permute and repeat the members of a tar."""

import os
from pathlib import Path

import numpy as np

from pipeline.shards.index import ShardIndex

IMAGE = "img"  # the component's name in DALI's index files


def write_dali_indices(index: ShardIndex, rows: np.ndarray, folder: Path) -> tuple[list[str], list[str]]:
    """Write the rows, in their order, as DALI index files; a tar is listed once per run of its rows."""
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
        tars.append(os.fspath(index.shard_path(run["shard"][0])))
        names.append(os.fspath(path))
    return tars, names
