"""Make a colour data set with nine classes: `python -m tools.studies.emoji PACKAGE [PACKAGE] --out FOLDER`.

The arguments are unpacked npm packages, `emoji-datasource-twitter` (drawings CC-BY 4.0) or `emoji-datasource-google`
(Apache-2.0), 16.0.0: `npm pack emoji-datasource-google@16.0.0` and `tar -xf`. A class is an emoji's category. The split is by
emoji rather than by picture, and the same for both packages, because they draw the same things; only one skin tone is kept.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from train.command import path_argument

VAL_SHARE = 0.3


def write_pictures(packages: Sequence[Path], out: Path) -> None:
    """Write class folders of 64x64 pictures, on white, under out/train and out/val."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=path_argument, metavar="PACKAGE", help="A package's folder `package`.")
    parser.add_argument("--out", type=path_argument, default=Path("emoji"), help="Write here. The default is %(default)s.")
    options = parser.parse_args()
    write_pictures(options.packages, options.out)
