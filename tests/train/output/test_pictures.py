"""Pictures of a run: which images they show, what is written above them, and that they suit light and dark pages."""

import json
import shutil
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from model.hjepa import HJEPA
from pipeline.shards.index import open_index
from tests.train.test_run import QUICKSTART, command
from train.config.load import load_config
from train.evaluation.online import OnlineEvaluation
from train.output.pictures import draw_run, tile
from train.trainer import Trainer


def test_what_is_not_picture_is_transparent_and_captions_are_legible_on_white_and_on_black() -> None:
    pixels = np.asarray(tile(Image.new("RGB", (50, 50), "red"), "a name that is too long for its tile\n\x1b[2J", 60))
    caption, picture = pixels[: len(pixels) - 60], pixels[len(pixels) - 60 :]
    assert (picture[5:-5, 5:-5] == [255, 0, 0, 255]).all()
    ink = caption[caption[..., 3] == 255]
    assert len(ink) > 5
    luminance = ((ink[..., :3] / 255) ** 2.2) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() > 4
    assert ((luminance + 0.05) / 0.05).min() > 4
    assert (caption[..., 3] == 0).mean() > 0.5


def test_a_run_that_masks_nothing_has_no_picture_of_masks(data_path: Path, tmp_path: Path) -> None:
    for strategy, weight, pictures in (("global_only", 1, {"crops", "masks", "features"}), ("none", 0, {"crops", "features"})):
        changes = [f"masking.strategy={strategy}", f"loss.prediction_weight={weight}"]
        path, *settings = command(QUICKSTART, data_path, tmp_path, *changes)
        trainer = Trainer(load_config(Path(path), settings))
        paths = draw_run(tmp_path, trainer.config, trainer.dataset, cast(HJEPA, trainer.model), trainer.masks)
        assert {path.stem for path in paths} == {path.stem for path in (tmp_path / "figures").iterdir()} == pictures


def test_neighbours_are_named_by_class_and_file(data_path: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(data_path, tmp_path / "shards"))
    for split in ("train", "val"):
        (shards / split / "manifest.json").write_text(json.dumps({"classes": ["cat\x1b", "dog"]}))
    path, *settings = command(QUICKSTART, shards, tmp_path)
    trainer = Trainer(load_config(Path(path), settings))
    evaluation = OnlineEvaluation(trainer.config, tmp_path, cast(HJEPA, trainer.model))
    evaluation.measure()
    rows = evaluation.neighbours(24, 3)
    index = open_index(shards / "val")
    assert [row.captions[0] for row in rows] == [
        f"{['cat' + chr(92) + 'x1b', 'dog'][label]}\n{index.name(i)}" for i, label in enumerate(index.samples["label"].tolist())
    ]
    assert all(len(row.pictures) == len(row.captions) == len(row.labels) == 4 for row in rows)
