"""Images without labels, in one folder or below it."""

from collections import Counter
from pathlib import Path

from pipeline.shards.index import UNLABELLED
from tools.shards.catalogue import Catalogue, LooseFiles, Source
from tools.shards.layouts.splits import plain_name
from tools.shards.layouts.walk import add_images, has_images, image_root, notes_beside_split


def open_flat(path: Path, split: str, spools: Path | None) -> Source | None:
    root = image_root(path, split)
    if root is None or not has_images(root):
        return None
    catalogue, skipped = Catalogue([LooseFiles(root)]), Counter[str]()
    add_images(catalogue, root, "", UNLABELLED, skipped)
    total = len(catalogue)
    beside = sum("/" not in catalogue.name(row) for row in range(total))
    note = f"{total:,} images without labels"
    if 0 < beside < total:
        note += (
            f": {beside:,} lie beside the folders, so the folders are not classes; "
            "--layout folders takes only the images in folders"
        )
    notes = (note, *([f"below {root}"] if root != path else []), *notes_beside_split(path, root))
    return Source("flat", plain_name(path), catalogue, notes=notes, skipped=skipped)
