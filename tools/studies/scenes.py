"""Compose scenes with exact masks: `python -m tools.studies.scenes CUTOUTS... PHOTOGRAPHS --out FOLDER`.

CUTOUTS are unpacked npm packages: `emoji-datasource-google` (Apache-2.0) and `emoji-datasource-twitter` (drawings CC-BY 4.0),
16.0.0: `npm pack emoji-datasource-google@16.0.0` and `tar -xf`. PHOTOGRAPHS is a folder of large pictures, such as the wallpapers
of Debian's plasma-workspace-wallpapers (GPL-2+), /usr/share/wallpapers. The emoji and photographs of val are not in train.

A scene lies in the folder of its main class, the one with the most pixels, so that pooled probes can use it too. `NAME.seg.png`
holds the class of each pixel: 0 for the photograph, 255 (ignored) where an outline is half transparent.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from train.command import path_argument

# The other categories are left out: no shape or colour is common to one of them.
CLASSES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Flags")
COUNTS = {"train": 6000, "val": 1000}
VAL_SHARE = 0.3  # of the emoji and of the photographs
MIN_SIDE = 700  # of a photograph; smaller pictures beside them are icons
SIDE = 64  # of a scene, in pixels
TILES = (4, 12)  # as many scenes are as wide as the photograph behind them
OBJECTS, SIZES = (2, 4), (0.35, 0.8)  # how many, and how large as a share of the scene
OPAQUE, CLEAR = 192, 64  # alpha between them is ignored


def find_cutouts(packages: Sequence[Path], rng: random.Random) -> dict[str, list[list[Path]]]:
    """Return the drawings of each class by split. All drawings of an emoji are in the same split."""
    found: dict[str, list[list[Path]]] = {split: [[] for _ in CLASSES] for split in COUNTS}
    for entry in sorted(json.loads((packages[0] / "emoji.json").read_text()), key=lambda entry: entry["unified"]):
        split = "val" if rng.random() < VAL_SHARE else "train"
        if entry["category"] in CLASSES:
            drawings = [path for package in packages for path in package.glob(f"img/*/64/{entry['image']}")]
            found[split][CLASSES.index(entry["category"])] += drawings
    return found


def find_photographs(folder: Path, rng: random.Random) -> dict[str, list[Image.Image]]:
    """Return the photographs of each split, shrunk. All pictures of one folder in `folder` are in the same split."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".jpg", ".png"):
            groups.setdefault(path.relative_to(folder).parts[0], []).append(path)
    found: dict[str, list[Image.Image]] = {split: [] for split in COUNTS}
    for number, name in enumerate(rng.sample(sorted(groups), len(groups))):
        split = "val" if number < VAL_SHARE * len(groups) else "train"
        for path in groups[name]:
            with Image.open(path) as picture:
                if min(picture.size) >= MIN_SIDE:
                    picture.draft("RGB", (SIDE * TILES[1],) * 2)
                    small = picture.convert("RGB")
                    small.thumbnail((SIDE * TILES[1],) * 2)
                    found[split].append(small)
    return found


def compose(cutouts: Sequence[Sequence[Path]], photograph: Image.Image, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """Return a scene and its mask `[SIDE, SIDE] uint8`: objects of random classes, sizes and places, later over earlier ones."""
    width = min(round(photograph.width / rng.uniform(*TILES) * 2), *photograph.size)
    x, y = (rng.randint(0, side - width) for side in photograph.size)
    scene = photograph.crop((x, y, x + width, y + width)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for _ in range(rng.randint(*OBJECTS)):
        label = rng.randrange(len(CLASSES))
        size = round(SIDE * SIZES[0] * (SIZES[1] / SIZES[0]) ** rng.random())
        drawing = Image.open(rng.choice(cutouts[label])).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        layer = Image.new("RGBA", scene.size)
        x, y = (rng.randint(-size // 4, SIDE - 3 * size // 4) for _ in range(2))
        layer.paste(drawing, (x, y))
        scene.paste(layer, mask=layer)
        alpha = np.asarray(layer.getchannel("A"))
        mask[alpha > CLEAR] = 255
        mask[alpha > OPAQUE] = 1 + label
    return scene, mask


def write_scenes(packages: Sequence[Path], photographs: Path, out: Path, counts: dict[str, int]) -> None:
    """Write out/train and out/val, always the same scenes. Raises ValueError without cut-outs or photographs."""
    rng = random.Random(0)
    cutouts, backgrounds = find_cutouts(packages, rng), find_photographs(photographs, rng)
    for split, count in counts.items():
        if not all(cutouts[split]) or not backgrounds[split]:
            raise ValueError(f"{split}: too few emoji in {packages[0]}, or photographs of {MIN_SIDE} pixels in {photographs}")
        for number in range(count):
            scene, mask = compose(cutouts[split], rng.choice(backgrounds[split]), rng)
            main = np.bincount(mask[(mask > 0) & (mask < 255)], minlength=2)[1:].argmax()
            folder = out / split / CLASSES[main].replace(" & ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            scene.save(folder / f"{number:05d}.jpg", quality=95)
            Image.fromarray(mask).save(folder / f"{number:05d}.seg.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cutouts", type=path_argument, nargs="+", help="Unpacked packages of emoji.")
    parser.add_argument("photographs", type=path_argument, help="A folder of photographs, at any depth.")
    parser.add_argument("--out", type=path_argument, default=Path("scenes"), help="Write here. The default is %(default)s.")
    options = parser.parse_args(arguments)
    write_scenes(options.cutouts, options.photographs, options.out, COUNTS)


if __name__ == "__main__":
    main()
