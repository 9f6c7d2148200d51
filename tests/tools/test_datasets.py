"""Composed scenes: their masks are exact, their splits share nothing, and the same command writes the same files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.shards.layouts.folders import walk_images
from tools.studies.datasets import CLASSES, SIDE, main, write_scenes

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]


def emoji_package(folder: Path) -> Path:
    """Write opaque squares, of one colour for each class."""
    entries = []
    for label, category in enumerate(CLASSES):
        for number in range(20):
            name = f"{label}-{number:02d}.png"
            entries.append({"unified": name, "image": name, "category": category})
            path = folder / "img" / "made" / "64" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (64, 64), (*COLOURS[label], 255)).save(path)
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


def test_scenes_show_their_masks_and_are_written_again_alike(tmp_path: Path) -> None:
    package, photographs = emoji_package(tmp_path / "package"), tmp_path / "photographs"
    for number in range(8):
        (photographs / str(number)).mkdir(parents=True)
        Image.new("RGB", (800, 700), (90 + 9 * number, 90, 90)).save(photographs / str(number) / "large.png")
        Image.new("RGB", (80, 70)).save(photographs / str(number) / "icon.png")
    for out in ("one", "two"):
        write_scenes([package], photographs, tmp_path / out, {"train": 12, "val": 6})
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 2 * (12 + 6)
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    grounds: dict[str, set[int]] = {"train": set(), "val": set()}
    for file in (file for file in files if file.name.endswith(".seg.png")):
        mask = np.asarray(Image.open(tmp_path / "one" / file))
        scene = np.asarray(Image.open(tmp_path / "one" / str(file).replace(".seg.png", ".jpg"))).astype(int)
        assert mask.shape == (SIDE, SIDE)
        assert set(np.unique(mask).tolist()) <= {*range(len(CLASSES) + 1), 255}
        inside = mask == 1 + np.bincount(mask[(mask > 0) & (mask < 255)] - 1).argmax()
        expected = [CLASSES[number].replace(" & ", "_") for number in range(len(CLASSES))].index(file.parts[1])
        assert np.abs(np.median(scene[inside], axis=0) - COLOURS[expected]).max() < 12
        grounds[file.parts[0]].add(round((np.median(scene[mask == 0][:, 0]) - 90) / 9))
    assert grounds["train"].isdisjoint(grounds["val"])
    skipped: Counter[str] = Counter()
    assert len(list(walk_images(tmp_path / "one", "", skipped))) == 18
    assert skipped["mask(s)"] == 18
    with pytest.raises(ValueError, match="train: too few emoji"):
        write_scenes([package], photographs / "0", tmp_path / "three", {"train": 1, "val": 1})


def test_squares_show_the_classes_of_their_frames_and_test_is_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, classes = tmp_path / "CamVid", np.zeros((300, 400), dtype=np.uint8)
    classes[:, 200:], classes[:20] = 8, 11
    for part in ("train", "val", "test"):
        for kind, pixels in (("", classes * 20), ("annot", classes)):
            (frames / f"{part}{kind}").mkdir(parents=True)
            Image.fromarray(pixels).save(frames / f"{part}{kind}" / f"{part}.png")
    assert main(["squares", str(frames), "--out", str(tmp_path / "out")]) == 0
    masks = sorted((tmp_path / "out").rglob("*.seg.png"))
    names = {split: {path.name[:-11] for path in masks if path.parts[-3] == split} for split in ("train", "val")}
    assert names == {"train": {"train", "val"}, "val": {"test"}}
    assert len(masks) == 12 * 2 + 4
    for path in masks:
        mask, square = np.asarray(Image.open(path)), np.asarray(Image.open(str(path).replace(".seg.png", ".jpg")))
        assert set(np.unique(mask)) <= {0, 8, 255}
        assert path.parent.name == ("sky" if (mask == 0).sum() >= (mask == 8).sum() else "car")
        for label in set(np.unique(mask)) - {255}:
            assert abs(np.median(square[mask == label]) - 20.0 * label) < 20
    assert main(["squares", str(tmp_path / "out"), "--out", str(tmp_path / "none")]) == 2
    assert "no frames in train or val" in capsys.readouterr().err
