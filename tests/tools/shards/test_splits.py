"""Folders of splits, of side data and of systems are no classes, and splits are never mixed silently."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sources
from reading import assert_colours_tell_labels, colour_of, run_convert, stored_samples

from pipeline.shards.index import open_index
from tools.make_shards import main
from tools.shards.layouts.folders import split_of

CLASSES = ("ant", "bee", "cat")


def classes_of(folder: Path) -> list[str]:
    return json.loads((folder / "manifest.json").read_text())["classes"]


def tree(root: Path, form: str, folders: dict[str, int]) -> Path:
    """`folders`: images per class, under each folder; as files or as one tar."""
    members = []
    for folder, per_class in folders.items():
        for label, name in enumerate(CLASSES):
            members += [(f"{folder}/{name}/{n}.jpg", sources.picture(label, n)) for n in range(per_class)]
    if form == "tar":
        root.mkdir(parents=True)
        (root / "x.tar").write_bytes(sources.tar_bytes(members))
        return root / "x.tar"
    for name, content in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["convert", str(source), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("name", "split"),
    [("Training", "train"), ("TEST", "test"), ("val2017", "val"), ("training_set", "train"), ("seg_train", "train"),
     ("Validation", "val"), ("dev", "val"), ("test-images", "test"), ("trainer", ""), ("latest", ""), ("valley", ""),
     ("train 1", ""), ("cat", "")],
)  # fmt: skip
def test_names_of_splits(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("form", ["folders", "tar"])
@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("training", "validation"), ("set/TRAIN", "set/Valid"), ("a_train", "a_val")]
)
def test_splits_by_any_usual_name_are_kept_apart(train: str, val: str, form: str, tmp_path: Path) -> None:
    if train == "a_train":
        train, val = "seg_train/seg_train", "seg_val/seg_val"
    source = tree(tmp_path / "in", form, {train: 4, val: 2})
    assert assert_colours_tell_labels(run_convert(source, tmp_path / "out"), 12) == [0, 1, 2]
    folder = run_convert(source, tmp_path / "out", "--split", "val")
    assert assert_colours_tell_labels(folder, 6) == [0, 1, 2]
    assert classes_of(folder) == list(CLASSES)


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_the_test_split_stands_in_for_val_and_train_never_does(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "in", form, {"Training": 2, "Testing": 1})
    assert assert_colours_tell_labels(run_convert(source, tmp_path / "out"), 6) == [0, 1, 2]
    capsys.readouterr()
    assert assert_colours_tell_labels(run_convert(source, tmp_path / "out", "--split", "val"), 3) == [0, 1, 2]
    assert "no val images: those of the test split are taken" in capsys.readouterr().out
    source = tree(tmp_path / "only", form, {"Training": 2})
    assert "no val images: the folders in it are Training" in refused(capsys, source, tmp_path / "b", "--split", "val")


def test_tars_of_train_and_test_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for label, split in enumerate(("train", "test")):
        (tmp_path / f"in/x-{split}.tar").write_bytes(
            sources.tar_bytes([("0.jpg", sources.picture(label, 0)), ("0.cls", b"%d" % label)])
        )
    assert assert_colours_tell_labels(run_convert(tmp_path / "in", tmp_path / "a"), 1) == [0]
    assert assert_colours_tell_labels(run_convert(tmp_path / "in", tmp_path / "b", "--split", "val"), 1) == [1]


@pytest.mark.parametrize("form", ["folders", "tar"])
@pytest.mark.parametrize("inside", ["ant/test", "ant/Training/deep"])
def test_splits_inside_a_class_are_refused(inside: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tree(tmp_path / "in", form, {inside: 1, "bee/x": 1})
    assert "named after a split" in refused(capsys, source, tmp_path / "out")


def test_a_folder_that_may_be_a_class_or_a_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.class_folders(tmp_path / "in", 2, ("bus", "car", "train"))
    assert "train is named after a split and lies next to bus, car" in refused(capsys, source, tmp_path / "out")
    (source / "train").rename(source / "test")
    assert "test is named after a split" in refused(capsys, source, tmp_path / "out")
    cifar = sources.class_folders(tmp_path / "c/train", 2, ("bus", "car", "train")).parent
    assert classes_of(run_convert(cifar, tmp_path / "out")) == ["bus", "car", "train"]


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_detection_data_have_no_classes(form: str, tmp_path: Path) -> None:
    members = [(f"images/{n}.jpg", sources.picture(0, n)) for n in range(4)]
    members += [(f"labels/{n}.txt", b"0 1 2 3 4") for n in range(4)]
    source = tmp_path / "x.tar"
    if form == "tar":
        source.write_bytes(sources.tar_bytes(members))
    else:
        source = tmp_path / "in"
        for name, content in members:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    folder = run_convert(source, tmp_path / "out")
    assert [sample.label for sample in stored_samples(folder)] == [-1] * 4
    assert classes_of(folder) == []


def packed(root: Path, form: str) -> Path:
    """Return the folder, or a tar of it."""
    if form == "tar":
        tar = root.with_suffix(".tar")
        subprocess.run(["tar", "-cf", str(tar), "-C", str(root), "."], check=True)
        return tar
    return root


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_masks_are_left_out_and_classes_below_images_are_found(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = sources.class_folders(tmp_path / "in/images").parent
    (root / "Masks").mkdir()
    (root / "Masks/0.png").write_bytes(sources.picture(0, 0, image_format="PNG"))
    folder = run_convert(packed(root, form), tmp_path / "out")
    said = "images below images/; 1 elsewhere, of other splits or masks, are left out"
    assert said in capsys.readouterr().out
    assert assert_colours_tell_labels(folder, 24) == [0, 1, 2]
    assert classes_of(folder) == list(CLASSES)


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_voc_gives_its_images_and_none_of_its_masks(form: str, tmp_path: Path) -> None:
    for folder, end in (
        ("JPEGImages", "jpg"),
        ("SegmentationClass", "png"),
        ("SegmentationObject", "png"),
        ("Annotations", "xml"),
    ):
        (tmp_path / "in/VOCdevkit/VOC2012" / folder).mkdir(parents=True)
        for n in range(3):
            content = sources.picture(n, n, image_format="PNG" if end == "png" else "JPEG")
            (tmp_path / f"in/VOCdevkit/VOC2012/{folder}/2012_{n}.{end}").write_bytes(content)
    source = packed(tmp_path / "in", form)
    if form == "tar":
        (tmp_path / "shards").mkdir()
        shutil.copy(source, tmp_path / "shards")
        assert main(["index", str(tmp_path / "shards")]) == 0
        assert len(open_index(tmp_path / "shards")) == 3
    samples = stored_samples(run_convert(source, tmp_path / "out"))
    assert sorted((sample.extension, sample.label) for sample in samples) == [("jpg", -1)] * 3


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_classes_below_their_initials_are_found_and_other_letters_are_classes(form: str, tmp_path: Path) -> None:
    for other, names in ((False, {"a/ant": 0, "b/Bee/deep": 1, "c/cat": 2}), (True, {"a/x": 0, "b/bee": 1, "c/cat": 2})):
        root = tmp_path / f"in{other}"
        for name, label in names.items():
            (root / name).mkdir(parents=True)
            (root / name / "0.jpg").write_bytes(sources.picture(label, 0))
        folder = run_convert(packed(root, form), tmp_path / f"out{other}")
        assert classes_of(folder) == (["a", "b", "c"] if other else ["Bee", "ant", "cat"])
        expected = {name.split("/")[0 if other else 1]: label for name, label in names.items()}
        for sample in stored_samples(folder):
            assert np.abs(sample.pixels().mean((0, 1)) - colour_of(expected[classes_of(folder)[sample.label]])).max() < 12


def test_folders_of_file_servers_are_no_classes(tmp_path: Path) -> None:
    root = sources.class_folders(tmp_path / "in")
    for name in ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "bee/@eaDir"):
        (root / name).mkdir()
        (root / name / "SYNOPHOTO_THUMB_M.jpg").write_bytes(sources.picture(9, 9))
    folder = run_convert(root, tmp_path / "out")
    assert classes_of(folder) == list(CLASSES)
    assert assert_colours_tell_labels(folder, 24) == [0, 1, 2]


def test_a_tar_next_to_class_folders_does_not_hide_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sources.class_folders(tmp_path / "in")
    (root / "backup.tar").write_bytes(sources.tar_bytes([("notes.txt", b"x")]))
    assert assert_colours_tell_labels(run_convert(root, tmp_path / "a"), 24) == [0, 1, 2]
    (root / "backup.tar").write_bytes(sources.tar_bytes([("x.jpg", sources.picture(0, 0))]))
    assert "choose --layout tars, folders or flat" in refused(capsys, root, tmp_path / "b")
    assert assert_colours_tell_labels(run_convert(root, tmp_path / "b", "--layout", "folders"), 24) == [0, 1, 2]


def test_one_label_for_all_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"{n}.{end}", sources.picture(3, n) if end == "jpg" else b"3") for n in range(3) for end in ("jpg", "cls")]
    (tmp_path / "x.tar").write_bytes(sources.tar_bytes(members))
    run_convert(tmp_path / "x.tar", tmp_path / "out")
    assert "all images have one label" in capsys.readouterr().out


def test_random_class_folders_keep_their_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = list("abcXYZ019_-. é汉")
    for trial in range(8):
        names = {"".join(rng.choice(letters, 5)).strip(". ") + f"_{k}" for k in range(int(rng.integers(2, 6)))}
        root = tmp_path / f"{trial}/in"
        for name in names:
            (root / name / "deep").mkdir(parents=True)
            (root / name / "deep/1.jpg").write_bytes(sources.picture(len(name), trial))
        folder = run_convert(root, tmp_path / f"{trial}/out")
        classes = classes_of(folder)
        assert set(classes) == names
        for sample in stored_samples(folder):
            assert classes[sample.label] == sample.name.split("/")[0]
