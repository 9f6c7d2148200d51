"""Advice for a data_path that holds neither shards nor pictures."""

import re
from pathlib import Path

from pipeline.shards.storage import STORES

PATTERN = re.compile(r"[*?\[]|\{.*\}")


def advise(place: str, split: str) -> str:
    """Return what to do about a path without the shards of a split, judged by what is there."""
    path, command = Path(place), "python tools/make_shards.py convert"
    if place.startswith("pipe:"):
        return f"{place}: commands are not run. Name the prefix that they read, such as s3://BUCKET/PREFIX, or a folder"
    if "://" in place:
        return f"{place}: unknown kind of store; allowed are {', '.join(f'{kind}://' for kind in STORES)} and local folders"
    if PATTERN.search(place) and not path.exists():
        return f"{place}: patterns are not expanded. Name the folder of the shards; all tars (*.tar) in it are read"
    if split != "train" and (path / "train").exists():
        aside = "where the images have no such split, convert them into another folder with `--val-ratio 0.1`"
        return f"{path / split}: no shards (*.tar) here. Make them with `{command} SOURCE --out {place} --split {split}`; {aside}"
    missing, run = f"{path / split}: no shards (*.tar) here", f"`{command} SOURCE --out {place} --val-ratio 0.1`"
    return f"{missing}. Set data_path to a folder of pictures, or run {run}"
