"""Plain colours, where 100 % is true: train and evaluate notice classes and data that do not belong together."""

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.index import open_index, save_index
from tests.train.test_run import QUICKSTART, command
from tools.make_shards import main as make_shards
from train.checkpoint import data_of, list_checkpoints
from train.config.load import load_config
from train.evaluate import main as evaluate
from train.evaluation.features import check_classes
from train.evaluation.online import read_baselines
from train.run import main as train

SHORT = ("training.max_steps=2", "evaluation.crop_ratio=1.0")
COLOURS = np.array([(r, g, b) for r in (20, 128, 235) for g in (20, 235) for b in (20, 235)])


def plain(colour: int, number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (34 + number, 36), tuple(COLOURS[colour].tolist())).save(out, "PNG")
    return out.getvalue()


def class_folders(root: Path, names: Sequence[str], colours: Sequence[int] | None = None, each: int = 12) -> Path:
    for colour, name in zip(colours or range(len(names)), names, strict=True):
        (root / name).mkdir(parents=True)
        for number in range(each):
            (root / name / f"{number}.png").write_bytes(plain(colour, number))
    return root


def foreign(folder: Path, labels: Sequence[int], colours: Sequence[int] | None = None) -> Path:
    """A WebDataset of three images for each label, without an index and a manifest."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "x-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (label, colour) in enumerate(zip(labels, colours or labels, strict=True)):
            for number in range(3):
                for suffix, content in (("png", plain(colour, number)), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{place:03d}-{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def convert(source: Path, out: Path, split: str) -> None:
    assert make_shards(["convert", str(source), "--out", str(out), "--split", split, "--workers", "1"]) == 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(errors) == 1
    return errors[0]


def knn_of(run: Path) -> dict[str, float]:
    return json.loads((run / "summary.json").read_text())["knn"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train from folders 0..11, val from a tar with integer cls members: one data set, as people have it."""
    home = tmp_path_factory.mktemp("plain")
    convert(class_folders(home / "in", [str(number) for number in range(12)]), home / "shards", "train")
    convert(foreign(home / "val", range(12)), home / "shards", "val")
    return home / "shards"


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train(command(QUICKSTART, shards, runs, *SHORT)) == 0
    return runs / "quickstart"


@pytest.fixture
def copied(shards: Path, run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Shards and the folder of the runs, to be changed. The shards lie elsewhere than those that the run was trained on."""
    shutil.copytree(shards, tmp_path / "shards")
    shutil.copytree(run, tmp_path / "runs" / "quickstart")
    return tmp_path / "shards", tmp_path / "runs"


def test_integer_folders_beside_integer_labels_reach_what_is_true(shards: Path, run: Path, tmp_path: Path) -> None:
    assert knn_of(run)["pixels"] == 100
    assert evaluate([str(run), "--probe", "knn", "--json", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert {f["accuracy"] for f in figures if (f["features"], f["setting"]) == ("pixels", "k=10")} == {100}


@pytest.mark.parametrize(
    ("names", "colours", "says"),
    [
        (("ant", "cat"), (0, 2), ("only train has bee", "label 1 is 'bee' in train and 'cat' in val")),
        (("ant", "bee", "cow"), (0, 1, 2), ("only train has cat", "only val has cow")),
        (("ant", "bee", "cat", "dog"), (0, 1, 2, 3), ("only val has dog",)),
    ],
)
def test_splits_of_different_classes_are_refused_by_train_and_evaluate(
    names: Sequence[str], colours: Sequence[int], says: Sequence[str], run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "shards"
    convert(class_folders(tmp_path / "in", ("ant", "bee", "cat")), out, "train")
    convert(class_folders(tmp_path / "val", names, colours), tmp_path / "apart", "val")
    shutil.move(tmp_path / "apart" / "val", out / "val")
    capsys.readouterr()
    assert train(command(QUICKSTART, out, tmp_path / "runs", *SHORT)) == 2
    line = one_line(capsys)
    assert all(part in line for part in says)
    assert str(out / "val") in line
    assert not (tmp_path / "runs").exists()
    assert evaluate([str(run), "--data", str(out)]) == 2
    assert one_line(capsys).removeprefix("evaluate: ") == line.removeprefix("train: ")


def test_a_val_that_lacks_the_last_class_or_all_names_is_not_refused(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    convert(class_folders(tmp_path / "in", ("ant", "bee", "cat")), out, "train")
    convert(class_folders(tmp_path / "val", ("ant", "bee")), tmp_path / "apart", "val")
    shutil.move(tmp_path / "apart" / "val", out / "val")
    check_classes(open_index(out / "train"), open_index(out / "val"))
    shutil.rmtree(out / "val")
    foreign(out / "val", (0, 1, 2))
    check_classes(open_index(out / "train"), open_index(out / "val"))


def test_labels_of_foreign_shards_that_train_does_not_have_are_named_and_the_rest_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "shards" / "train", (0, 1, 2, 3))
    foreign(tmp_path / "shards" / "val", (0, 1, 2, 7))
    assert train(command(QUICKSTART, tmp_path / "shards", tmp_path, *SHORT, "evaluation.knn_k=3")) == 0
    said = capsys.readouterr().out
    assert "3 of 12 images have labels that no image of" in said
    assert ": 7. " in said
    assert knn_of(tmp_path / "quickstart")["pixels"] == 75


def test_one_label_for_all_images_gives_no_accuracies_and_train_and_evaluate_say_why(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, colours in (("train", (0,)), ("val", (1,))):
        convert(class_folders(tmp_path / split, ("photographs",), colours), tmp_path / "shards", split)
    capsys.readouterr()
    assert train(command(QUICKSTART, tmp_path / "shards", tmp_path / "runs", *SHORT)) == 0
    said = capsys.readouterr().out
    why = "all 12 images have the label 0, so accuracies mean nothing"
    assert said.count(why) == 1
    assert "k-NN" not in said
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert (summary["knn"], summary["linear"], summary["one_label"]) == (None, None, True)
    assert "all training images have one label" in (tmp_path / "runs/quickstart/report.html").read_text()
    assert evaluate([str(run), "--data", str(tmp_path / "shards")]) == 0
    printed = capsys.readouterr()
    assert printed.err.count(why) == 1
    assert "| placement |" in printed.out
    assert "k-NN" not in printed.out
    assert "| knn |" not in printed.out


def test_baselines_of_an_old_val_are_measured_again_at_the_initialisation(
    copied: tuple[Path, Path], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, runs = copied
    good = open_index(shards / "val")
    wrong = good.samples.copy()
    wrong["label"] = (wrong["label"] + 1) % 12
    save_index(shards / "val", list(good.shards), wrong)
    assert train(command(QUICKSTART, shards, runs, *SHORT)) == 0
    assert "measuring the baselines again" in capsys.readouterr().out
    assert knn_of(runs / "quickstart")["pixels"] == 0
    save_index(shards / "val", list(good.shards), good.samples)
    assert train(command(QUICKSTART, shards, runs, *SHORT)) == 0  # complete: the weights are those of step 2
    assert knn_of(runs / "quickstart") == pytest.approx(knn_of(run))


def test_damaged_baselines_are_measured_again(copied: tuple[Path, Path]) -> None:
    shards, runs = copied
    path = runs / "quickstart" / "baselines.json"
    whole, content = path.read_text(), json.loads(path.read_text())
    wrong_values = [json.dumps({**content, "knn": {**content["knn"], "pixels": x}}) for x in (None, "5", float("nan"), 101, True)]
    for text in ("", "null", "5", "{}", "{", '{"pixels": 5.0}', *wrong_values):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"baselines\.json: damaged"):
            read_baselines(path, content["measured_on"])
    assert train(command(QUICKSTART, shards, runs, *SHORT)) == 0
    assert path.read_text() == whole


def test_other_images_under_the_name_of_a_run_are_refused_and_nothing_is_touched(
    copied: tuple[Path, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = copied
    other = tmp_path / "other"
    foreign(other / "train", range(12))
    foreign(other / "val", range(12))

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (runs / "quickstart").glob("[!.]*") if path.is_file()}

    before = files()
    capsys.readouterr()
    more = [*SHORT[1:], "training.max_steps=3"]
    assert train(command(QUICKSTART, other, runs, *more)) == 2
    line = one_line(capsys)
    assert f"data.data_path was {shards}, is {other}" in line
    assert "checkpoint.resume=none" in line
    assert files() == before
    assert train(command(QUICKSTART, other, runs, *more, "checkpoint.resume=none")) == 0
    assert (runs / "quickstart" / "old-1" / "baselines.json").exists()


def test_a_moved_folder_continues_with_or_without_its_side_files(copied: tuple[Path, Path]) -> None:
    shards, runs = copied
    assert open_index(shards / "train").digest == data_of(list_checkpoints(runs / "quickstart" / "checkpoints")[-1])
    for name in ("index.npy", "index.json", "manifest.json"):
        (shards / "train" / name).unlink()
    assert train(command(QUICKSTART, shards, runs, *SHORT[1:], "training.max_steps=3")) == 0
    assert json.loads((runs / "quickstart" / "summary.json").read_text())["steps"] == 3


def test_damaged_settings_of_a_run_are_one_line_with_the_remedy_that_works(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shards, runs = copied
    path = runs / "quickstart" / "config.yaml"
    for text in ("", "null", "5", "{}", "a: [", "\x00"):
        path.write_text(text)
        capsys.readouterr()
        assert train(command(QUICKSTART, shards, runs, *SHORT)) == 2
        assert f"{path}: damaged" in one_line(capsys)
    path.unlink()
    assert train(command(QUICKSTART, shards, runs, *SHORT)) == 0


def test_a_finished_run_names_the_setting_that_ended_it(copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shards, runs = copied
    assert train(command(QUICKSTART, shards, runs, *SHORT)) == 0
    assert "to continue, raise training.max_steps, now 2;" in capsys.readouterr().out


def test_a_run_starts_from_a_folder_of_pictures_and_converts_it_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos, runs, cache = class_folders(tmp_path / "photos", ["a", "b"], each=20), tmp_path / "runs", tmp_path / "cache"
    changes = ["training.max_steps=1", "training.warmup_epochs=0", f"data.cache_dir={cache}", "data.val_ratio=0.25"]
    assert train(command(QUICKSTART, photos, runs, *changes)) == 0
    shards = Path(load_config(runs / "quickstart" / "config.yaml").data.data_path)
    assert (len(open_index(shards / "train")), len(open_index(shards / "val"))) == (30, 10)
    assert train(command(QUICKSTART, photos, runs, *changes, "training.max_steps=2")) == 0
    assert capfd.readouterr().out.count("converted to") == 1
    assert train(command(QUICKSTART, shards, runs, *changes)) == 2
    assert "holds shards already" in capfd.readouterr().err
