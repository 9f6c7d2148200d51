"""The dense probe: its scores against slow references, a case with a known answer, and the four layouts of masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.test_run import ROOT, command
from train.config.load import load_config
from train.evaluate import main as evaluate
from train.evaluation.dense import (
    CITYSCAPES_IDS,
    confusion,
    dense_figures,
    find_masks,
    majority,
    mean_iou,
    patch_counts,
    raw_patches,
    small_objects,
)
from train.run import main as train

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def slow_mean_iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    scores = []
    for label in set(truth[truth != 255].tolist()):
        known = truth != 255
        hit = ((truth == label) & (predicted == label)).sum()
        either = (known & ((truth == label) | (predicted == label))).sum()
        scores.append(hit / either)
    return 100 * float(np.mean(scores))


def test_the_mean_iou_of_filled_patches_equals_that_of_their_pixels_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for patch, grid in ((1, 5), (2, 3), (4, 2), (3, 7)):
        size = patch * grid
        masks = rng.choice([0, 1, 2, 9, 255], (3, size, size)).astype(np.uint8)
        predicted = rng.choice([0, 1, 4, 9], (3, grid, grid))
        pixels = predicted.repeat(patch, 1).repeat(patch, 2)
        counts = patch_counts(torch.from_numpy(masks), patch)
        matrix = confusion(counts, torch.from_numpy(predicted.flatten()))
        assert mean_iou(matrix) == pytest.approx(slow_mean_iou(masks, pixels))
        assert int(matrix.sum()) == masks.size
        cells = masks.reshape(3, grid, patch, grid, patch).swapaxes(2, 3).reshape(-1, patch**2)
        most = [np.bincount(cell[cell != 255], minlength=1).argmax() if (cell != 255).any() else 255 for cell in cells]
        assert majority(counts).tolist() == most


def test_small_objects_are_the_connected_regions_below_an_area() -> None:
    mask = torch.zeros(1, 6, 6, dtype=torch.uint8)
    mask[0, :2, :2], mask[0, 4:, 2:], mask[0, 0, 4:] = 3, 3, 255
    small = small_objects(mask, area=5)
    assert small[0, :2, :2].eq(3).all()
    assert int((small != 255).sum()) == 4


def write_pair(image: Path, mask: Path, pixels: np.ndarray, values: np.ndarray) -> None:
    for path, array in ((image, pixels), (mask, values)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(path)


def coloured_scenes(folder: Path, size: int = 32, count: int = 20) -> Path:
    """Write images whose quarters have the colour of their class, and one ignored quarter each."""
    rng = np.random.default_rng(1)
    colours = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (120, 120, 120)])
    for split in ("train", "val"):
        for number in range(count):
            labels = rng.integers(0, 3, (2, 2))
            labels[rng.integers(2), rng.integers(2)] = 3
            whole = labels.repeat(size // 2, 0).repeat(size // 2, 1)
            path = folder / split / f"{number}.png"
            write_pair(path, path.with_name(f"{number}.seg.png"), colours[whole], np.where(whole == 3, 255, whole))
    return folder


def test_a_task_that_colour_solves_is_solved_and_tokens_without_information_solve_nothing(tmp_path: Path) -> None:
    folder = coloured_scenes(tmp_path)
    config = load_config(QUICKSTART, ["data.multicrop.global_crop_size=32", "data.data_path=none"])
    rows = {"pixels": raw_patches(8), "constant": lambda crops: {"last": torch.ones(len(crops), 16, 5)}}
    figures = dense_figures(folder, rows, config, 8, torch.device("cpu"))
    scores = {(row["features"], row["probe"]): row["miou"] for row in figures}
    assert scores["limit", ""] == scores["pixels", "knn"] == scores["pixels", "linear"] == 100
    assert scores["constant", "linear"] < 30
    assert figures == dense_figures(folder, rows, config, 8, torch.device("cpu"))


def test_masks_are_found_in_each_layout_with_the_classes_that_its_values_stand_for(tmp_path: Path) -> None:
    gray, values = np.full((4, 4, 3), 99), np.array([[0, 1, 7, 255]] * 4)
    voc, ade, cityscapes, plain = (tmp_path / name for name in ("VOC2012", "ADE", "cityscapes", "plain"))
    for split, longer in (("train", "training"), ("val", "validation")):
        write_pair(voc / f"JPEGImages/{split}1.jpg", voc / f"SegmentationClass/{split}1.png", gray, values)
        lists = voc / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{split}1\n")
        write_pair(ade / f"images/{longer}/a.jpg", ade / f"annotations/{longer}/a.png", gray, values)
        stem = f"{split}/town/town_0"
        city = (cityscapes / f"leftImg8bit/{stem}_leftImg8bit.png", cityscapes / f"gtFine/{stem}_gtFine_labelIds.png")
        write_pair(*city, gray, values)
        write_pair(plain / f"{split}/cat/a.jpg", plain / f"{split}/cat/a.seg.png", gray, values)
    expected = {voc: [0, 1, 7, 255], ade: [255, 0, 6, 254], cityscapes: [255, 255, CITYSCAPES_IDS.index(7), 255]}
    for folder, classes in {**expected, plain: [0, 1, 7, 255]}.items():
        for split in ("train", "val"):
            ((images, masks),) = find_masks(folder, split).batches(4)
            assert images.shape == (1, 3, 4, 4)
            assert masks[0, 0].tolist() == classes, folder


def test_the_command_prints_the_table_and_refuses_what_it_cannot_measure(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, scenes = tmp_path / "tiny", coloured_scenes(tmp_path / "scenes")
    settings = ["training.max_steps=1", "evaluation.eval_frequency=0", "logging.run_name=tiny"]
    assert train(command(QUICKSTART, data_path, tmp_path, *settings)) == 0
    capsys.readouterr()
    arguments = [str(run), "--probe", "dense", "--masks"]
    assert evaluate([*arguments, str(scenes), "--json", str(tmp_path / "dense.json")]) == 0
    assert "| raw patches | linear | lr " in capsys.readouterr().out
    rows = {figure["features"] for figure in json.loads((tmp_path / "dense.json").read_text())["dense"]["figures"]}
    assert rows == {"pixels", "random_init", "trained", "limit"}
    (scenes / "val" / "3.png").unlink()
    Image.new("RGB", (8, 8)).save(scenes / "train" / "0.seg.png")
    for folder, problem in ((scenes, "3: no .jpg"), (tmp_path, "no masks of train here"), (scenes / "train", "no masks")):
        assert evaluate([*arguments, str(folder)]) == 2
        assert problem in capsys.readouterr().err
    (scenes / "val" / "3.seg.png").unlink()
    assert evaluate([*arguments, str(scenes)]) == 2
    assert "0.seg.png: a mask of mode RGB" in capsys.readouterr().err
    assert evaluate(arguments[:3]) == 2
