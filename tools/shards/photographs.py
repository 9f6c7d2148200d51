"""The sample data set: tiles of the photographs that ship with scikit-image, scikit-learn and matplotlib."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from tools.shards.catalogue import Catalogue, Source

TILE = 48
GAP = 4  # columns between the train part and the val part
NUM_TILES = {"train": 150, "val": 40}
NUM_SHARDS = {"train": 4, "val": 1}
VAL_RATIO = 0.3
SKIMAGE, SKLEARN, MATPLOTLIB = "skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data"
CC0, CC_BY, PUBLIC = "CC0 1.0", "CC BY 2.0", "public domain"
NO_RESTRICTIONS = "no known copyright restrictions"

# (file, author or origin, licence), as skimage/data/_fetchers.py and sklearn/datasets/images/README.txt state them.
# Left out: moon, page and motorcycle_left (no licence is stated) and rocket (its Flickr page says non-commercial).
PHOTOGRAPHS = (
    (SKIMAGE, "astronaut.png", "NASA", PUBLIC),
    (SKIMAGE, "brick.png", "CC0Textures, Bricks25", CC0),
    (SKIMAGE, "camera.png", "Lav Varshney", CC0),
    (SKIMAGE, "cell.png", "Paul Müller et al., Optics Express 26(8), 2018", CC0),
    (SKIMAGE, "chelsea.png", "Stefan van der Walt", CC0),
    (SKIMAGE, "clock_motion.png", "Stefan van der Walt", PUBLIC),
    (SKIMAGE, "coffee.png", "Rachel Michetti, Pikolo Espresso Bar", CC0),
    (SKIMAGE, "coins.png", "Brooklyn Museum Collection", NO_RESTRICTIONS),
    (SKIMAGE, "grass.png", "DeviantArt, linolafett, Grass 01", CC0),
    (SKIMAGE, "gravel.png", "CC0Textures, Gravel04", CC0),
    (SKIMAGE, "hubble_deep_field.jpg", "NASA, HubbleSite", PUBLIC),
    (SKIMAGE, "ihc.png", "Center for Microscopy and Molecular Imaging (CMMI)", NO_RESTRICTIONS),
    (SKIMAGE, "microaneurysms.png", "Andreas Maier, HRF Image Database", CC0),
    (SKIMAGE, "retina.jpg", "Mikael Häggström, Wikimedia Commons", CC0),
    (SKIMAGE, "text.png", "Wikipedia, Corner.png", PUBLIC),
    (SKLEARN, "china.jpg", "danielbuechele on Flickr, photo 6061409035", CC_BY),
    (SKLEARN, "flower.jpg", "vultilion on Flickr, photo 6056698931", CC_BY),
    (MATPLOTLIB, "grace_hopper.jpg", "United States Navy", PUBLIC),
)


def photograph_source(split: str) -> Source:
    """Build the tiles of a split: train from the left part of each photograph, val from the right. Raises ValueError."""
    tiles, labels = [], []
    for label, (folder, file, _, _) in enumerate(PHOTOGRAPHS):
        pixels = np.asarray(Image.open(photograph_path(folder, file)).convert("RGB"))
        corners = tile_corners(pixels.shape[0], pixels.shape[1], split, seed=label)
        tiles += [pixels[y : y + TILE, x : x + TILE] for y, x in corners]
        labels += [label] * len(corners)
    classes = tuple(Path(file).stem for _, file, _, _ in PHOTOGRAPHS)
    names = (f"{classes[label]}/{split}-{row:05d}" for row, label in enumerate(labels))
    catalogue = Catalogue.of_pixels(np.stack(tiles), labels, names)
    attributions = tuple(
        {"class": Path(file).stem, "file": f"{folder}/{file}", "origin": origin, "licence": licence}
        for folder, file, origin, licence in PHOTOGRAPHS
    )
    return Source("photographs", "sample", catalogue, classes, attributions, (f"{len(classes)} photographs",))


def tile_corners(height: int, width: int, split: str, seed: int) -> list[tuple[int, int]]:
    """Return the top left corners (y, x) of one photograph's tiles, all different. The splits are GAP columns apart."""
    val_start = width - max(TILE, round(width * VAL_RATIO))
    first, last = (0, val_start - GAP - TILE) if split == "train" else (val_start, width - TILE)
    rows, columns = height - TILE + 1, last - first + 1
    draws = np.random.Philox(key=[seed, split == "val"]).random_raw(rows * columns)
    smallest = np.argpartition(draws, NUM_TILES[split])[: NUM_TILES[split]]  # sorting all takes seconds
    corners = smallest[np.argsort(draws[smallest])].tolist()
    return [(corner // columns, first + corner % columns) for corner in corners]


def photograph_path(folder: str, file: str) -> Path:
    """Return an installed photograph. Raises ValueError when its package is not installed."""
    package, _, below = folder.partition("/")
    spec = find_spec(package)  # finds the package without importing it
    path = Path(((spec and spec.submodule_search_locations) or [""])[0]) / below / file
    if not path.is_file():
        raise ValueError(f"the sample needs {below}/{file} of {package}, which is not installed: pip install -e .[sample]")
    return path
