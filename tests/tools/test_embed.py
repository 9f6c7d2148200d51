"""Vectors of a folder and of shards against the features that an evaluation measures, and the questions that they answer."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.dataset import centre_crop_dataset
from pipeline.loader import build_multicrop_dataloader
from pipeline.shards.converted import converted
from pipeline.shards.index import open_index
from tests.conftest import photographs
from tests.train.test_run import QUICKSTART, command
from tools.embed import main as embed
from tools.embedding.search import duplicate_groups, predict
from tools.export import main as export
from train.evaluation.features import extract, pooled_features
from train.evaluation.offline import find_checkpoint, load_models
from train.run import main as train


@pytest.fixture(scope="module")
def run(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train(command(QUICKSTART, data_path, folder, "training.max_steps=2", "training.warmup_epochs=0")) == 0
    return folder / "quickstart"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photographs in two classes, the first of which is there again, once as it is and once enlarged."""
    folder = tmp_path_factory.mktemp("photos")
    for i, picture in enumerate(photographs(20)):
        path = folder / ("coffee" if i % 2 else "astronaut") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        if i == 0:
            shutil.copy(path, path.with_name("copy.png"))
            picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC).save(path.with_name("larger.png"))
    return folder


def test_a_run_and_its_export_give_the_features_of_the_evaluation(run: Path, data_path: Path, tmp_path: Path) -> None:
    assert export([str(run), "--out", str(tmp_path / "exported"), "--license", "mit"]) == 0
    vectors = {}
    for name, model in (("run", run), ("exported", tmp_path / "exported")):
        out = tmp_path / f"{name}.npz"
        assert embed([str(model), str(data_path), "--out", str(out), "--device", "cpu", "--tokens"]) == 0
        with np.load(out) as file:
            vectors[name] = file["vector"]
            assert (len(file["name"]), file["tokens"].shape) == (103 + 24, (127, 16, 16))
            assert file["name"][0].startswith("train/")
            assert file["name"][-1].startswith("val/")
            assert file["label"][:3].tolist() == ["0", "1", "0"]
            np.testing.assert_allclose(file["tokens"].astype(np.float32).mean(axis=1), file["vector"], atol=2e-3)
    np.testing.assert_array_equal(vectors["run"], vectors["exported"])
    checkpoint, config = find_checkpoint(run)
    model, _ = load_models(checkpoint, config, torch.device("cpu"))
    augmentation = config.data.augmentation
    dataset = centre_crop_dataset(
        open_index(data_path / "train"), 32, config.evaluation.crop_ratio, augmentation.mean, augmentation.std
    )
    loader = build_multicrop_dataloader(dataset, 16, shuffle=False, drop_last=False, device="cpu")
    expected = extract(loader, {"trained": pooled_features(model.target)})["trained"].values["last"].numpy()
    np.testing.assert_allclose(vectors["run"][:103], expected, atol=2e-3)


def test_a_stopped_pass_continues_from_what_it_has_written(run: Path, data_path: Path, tmp_path: Path) -> None:
    arguments = [str(run), str(data_path / "train"), "--out", str(tmp_path / "a.npz"), "--device", "cpu", "--batch-size", "8"]
    assert embed(arguments) == 0
    whole = np.load(tmp_path / "a.npz")["vector"]
    work = tmp_path / ".a.npz.work" / "0"
    state, partial = json.loads((work / "state.json").read_text()), np.load(work / "vectors.npy")
    partial[:40] = 7  # which shows that they are not computed again
    partial[40:] = 0
    np.save(work / "vectors.npy", partial)
    (work / "state.json").write_text(json.dumps(state | {"done": 40}))
    assert embed(arguments) == 0
    resumed = np.load(tmp_path / "a.npz")["vector"]
    assert (resumed[:40] == 7).all()
    np.testing.assert_array_equal(resumed[40:], whole[40:])


def test_a_folder_of_pictures_is_converted_once_and_its_copies_are_found(
    run: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), str(photos), "--out", str(tmp_path / "f.npz"), "--device", "cpu", "--cache", str(tmp_path / "cache")]
    query = [str(photos / "coffee" / "03.png"), "astronaut/04.png"]
    assert embed([*arguments, "--duplicates", "0.99999", "--neighbours", *query]) == 0
    said = capfd.readouterr()
    assert said.err.count("converted to") == 2  # the folder, and the file of the query
    with np.load(tmp_path / "f.npz") as file:
        names, vectors, labels = file["name"].tolist(), file["vector"], file["label"].tolist()
    assert sorted(names)[:2] == ["astronaut/00.png", "astronaut/02.png"]
    assert all(name.split("/")[0] == label for name, label in zip(names, labels, strict=True))
    (group, weakest) = duplicate_groups(vectors, 0.99999)[0]
    assert {"astronaut/00.png", "astronaut/copy.png"} <= {names[row] for row in group}
    assert weakest > 0.99999
    first, second = said.out.splitlines()[-3:-1]
    assert f"{query[0]}: coffee/03.png 1.000" in first  # the file is found as itself
    assert "astronaut/04.png: " in second
    assert "astronaut/04.png 1.000" not in second
    page = (tmp_path / "f.duplicates.html").read_text()
    assert page.count("<figure") >= 2
    assert "astronaut/copy.png" in page
    assert embed(arguments) == 0
    assert "using its shards" in capfd.readouterr().err


def test_a_parquet_file_has_the_same_columns(run: Path, data_path: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a.npz", "a.parquet"):
        assert embed([str(run), str(data_path / "val"), "--out", str(tmp_path / name), "--device", "cpu", "--tokens"]) == 0
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    with np.load(tmp_path / "a.npz") as file:
        assert list(table) == file.files
        for key, values in table.items():
            np.testing.assert_array_equal(np.array(values), file[key].reshape(np.array(values).shape))


def test_few_labels_name_the_rest(run: Path, photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("name,label\n" + "".join(f"{'coffee' if i % 2 else 'astronaut'}/{i:02d}.png,{i % 2}\n" for i in range(12)))
    arguments = [str(run), str(photos), "--out", str(tmp_path / "f.npz"), "--device", "cpu", "--cache", str(tmp_path / "cache")]
    assert embed([*arguments, "--few-labels", str(labels)]) == 0
    with (tmp_path / "f.labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22
    assert all(row["label"] in "01" and 0.5 <= float(row["confidence"]) <= 1 for row in rows)
    assert (tmp_path / "f.labels.html").read_text().count("<figure") == 22 - 12


def test_predictions_are_right_where_classes_are_apart() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 32))
    truth = np.arange(300) % 3
    vectors = (centres[truth] + 0.2 * rng.normal(size=(300, 32))).astype(np.float32)
    classes, chances = predict(vectors, {row: f"class {truth[row]}" for row in range(12)})
    assert (classes == [f"class {label}" for label in truth]).all()
    assert chances.min() > 0.5


def test_groups_are_chains_of_similar_vectors() -> None:
    angles = np.array([0.0, 0.02, 0.04, 1.0, 1.01, 2.0])
    groups = duplicate_groups(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), float(np.cos(0.025)))
    assert [sorted(rows) for rows, _ in groups] == [[3, 4], [0, 1, 2]]
    np.testing.assert_allclose([weakest for _, weakest in groups], np.cos([0.01, 0.02]), atol=1e-6)


def test_a_changed_folder_is_converted_anew(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(photos, folder)
    first = converted(folder, tmp_path / "cache", val_ratio=0.2)
    assert (first / "val" / "manifest.json").exists()
    assert converted(folder, tmp_path / "cache", val_ratio=0.2) == first
    (folder / "coffee" / "01.png").unlink()
    second = converted(folder, tmp_path / "cache", val_ratio=0.2)
    assert second != first
    assert len(open_index(second / "train")) + len(open_index(second / "val")) == 21


def test_what_cannot_be_embedded_is_one_clean_line(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv").write_text("coffee/99.png,a\n")
    cache = ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--out", str(tmp_path / "f.npz")]
    for arguments, message in (
        ([str(tmp_path), str(photos)], "neither a run's folder nor a checkpoint"),
        ([str(run), str(tmp_path / "nothing")], "no such file or folder"),
        ([str(run), str(photos), "--few-labels", str(tmp_path / "labels.csv")], "no line names an image"),
        ([str(run), str(photos), "--neighbours", "0.png"], "0.png: no image of that name"),
    ):
        capsys.readouterr()
        assert embed([*arguments, *cache]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
