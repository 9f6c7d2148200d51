"""Make a colour data set with nine classes: `python -m tools.studies.emoji TWITTER GOOGLE --out FOLDER`.

The two arguments are unpacked npm packages, `emoji-datasource-twitter` (drawings CC-BY 4.0) and `emoji-datasource-google`
(Apache-2.0), 16.0.0: `npm pack emoji-datasource-google@16.0.0` and `tar -xf`. A class is an emoji's category. The split is by
emoji rather than by picture, because both packages draw the same things; only one skin tone is kept.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from train.command import path_argument

VAL_SHARE = 0.3


def write_pictures(packages: dict[str, Path], out: Path) -> None:
    """Write class folders of 64x64 pictures, on white, under out/train and out/val."""
    rng = random.Random(0)
    emoji = json.loads((packages["twitter"] / "emoji.json").read_text())
    for entry in sorted(emoji, key=lambda entry: entry["unified"]):
        if entry["category"] == "Component":
            continue
        split = "val" if rng.random() < VAL_SHARE else "train"
        tones = sorted(tone["image"] for tone in entry.get("skin_variations", {}).values())
        folder = out / split / entry["category"].replace(" & ", "_").replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        for name in [entry["image"], *(rng.sample(tones, 1) if tones else [])]:
            for kind, package in packages.items():
                if (picture := package / "img" / kind / "64" / name).exists():
                    drawing = Image.open(picture).convert("RGBA")
                    paper = Image.new("RGBA", drawing.size, "white")
                    Image.alpha_composite(paper, drawing).convert("RGB").save(folder / f"{kind}_{name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twitter", type=path_argument, help="The folder `package` of emoji-datasource-twitter.")
    parser.add_argument("google", type=path_argument, help="The folder `package` of emoji-datasource-google.")
    parser.add_argument("--out", type=path_argument, default=Path("emoji"), help="Write here. The default is %(default)s.")
    options = parser.parse_args()
    write_pictures({"twitter": options.twitter, "google": options.google}, options.out)
