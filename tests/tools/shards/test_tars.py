"""One rule for the labels of all tars: cls or json, else the tars inside, else the folders, else none."""

from pathlib import Path

import pytest
import sources
from reading import assert_colours_tell_labels, run_convert, stored_samples

from tools.make_shards import main

CLASSES = ("ant", "bee", "cat")


def class_tar(label: int, folder: str = "", number: int = 4) -> bytes:
    return sources.tar_bytes((f"{folder}{label}_{n}.jpg", sources.picture(label, n)) for n in range(number))


def converted(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, *options: str) -> str:
    """Convert one tar to `out`; returns the line on its layout."""
    (tmp_path / name).write_bytes(content)
    run_convert(tmp_path / name, tmp_path / "out", *options)
    return capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("folder", ["", "./", "set/images/"])
@pytest.mark.parametrize("inside", ["", "pictures/"])
def test_tars_in_a_tar_are_classes_wherever_they_lie(
    folder: str, inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{folder}{name}.tar", class_tar(label, inside)) for label, name in enumerate(CLASSES)]
    content = sources.tar_bytes([("set/README.txt", b"read me"), *reversed(members)])
    line = converted(tmp_path, capsys, "My Set.tar", content)
    assert "3 classes named by the tars in it: ant, bee, cat" in line
    assert assert_colours_tell_labels(tmp_path / "out/train", 12) == [0, 1, 2]
    assert (tmp_path / "out/train/my-set-train-000000.tar").exists()


def test_class_tars_named_by_wnids_are_imagenet_under_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"{wnid}.tar", class_tar(sources.WNID_LABELS[wnid])) for wnid in sources.WNIDS]
    converted(tmp_path, capsys, "subset.tar", sources.tar_bytes(members))
    assert assert_colours_tell_labels(tmp_path / "out/train", 12) == [0, 230, 278]
    assert (tmp_path / "out/train/imagenet-train-000000.tar").exists()


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_shards_in_a_tar_keep_their_own_labels(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = []
    for shard in range(3):
        members = []
        for label in (2, 0, 1):
            text = f"{label}" if kind == "cls" else f'{{"label": {label}}}'
            members += [(f"{label}.jpg", sources.picture(label, shard)), (f"{label}.{kind}", text.encode())]
        shards.append((f"shard-{shard:04d}.tar", sources.tar_bytes(members)))
    assert "labels from cls or json members" in converted(tmp_path, capsys, "x.tar", sources.tar_bytes(shards))
    assert assert_colours_tell_labels(tmp_path / "out/train", 9) == [0, 1, 2]


@pytest.mark.parametrize("common", ["", "./", "mydata/", "a/b/"])
def test_folders_in_a_tar_are_classes(common: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [
        (f"{common}{name}/day {n % 2}/{n}.jpg", sources.picture(label, n)) for n in range(4) for label, name in enumerate(CLASSES)
    ]
    line = converted(tmp_path, capsys, "x.tar", sources.tar_bytes(images))
    assert "3 classes named by the folders in it: ant, bee, cat" in line
    assert assert_colours_tell_labels(tmp_path / "out/train", 12) == [0, 1, 2]


def test_folders_of_splits_in_a_tar_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [
        (f"set/{split}/{name}/{n}.jpg", sources.picture(label, n))
        for split, number in (("train", 4), ("val", 2), ("test", 1))
        for n in range(number)
        for label, name in enumerate(CLASSES)
    ]
    content = sources.tar_bytes(images)
    line = converted(tmp_path, capsys, "x.tar", content)
    assert "images below set/train/; 9 elsewhere, of other splits or masks, are left out" in line
    assert assert_colours_tell_labels(tmp_path / "out/train", 12) == [0, 1, 2]
    converted(tmp_path, capsys, "x.tar", content, "--split", "val")
    assert assert_colours_tell_labels(tmp_path / "out/val", 6) == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["a.jpg", "b.jpg"], "2 images without labels)"),
        (["x/a.jpg", "x/b.jpg"], "2 images without labels)"),
        (["x/a.jpg", "x/c/b.jpg", "x/d/b.jpg"], "3 images without labels: 1 lie next to the folders"),
        (["IMG_1.jpg", "IMG_1.png"], "2 images without labels)"),
    ],
)
def test_a_tar_without_labels_says_so(names: list[str], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = sources.tar_bytes((name, sources.picture(0, n)) for n, name in enumerate(names))
    assert note in converted(tmp_path, capsys, "x.tar", content)
    assert {sample.label for sample in stored_samples(tmp_path / "out/train")} == {-1}


def test_a_folder_of_class_tars_has_no_labels_and_says_how_it_gets_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for label, name in enumerate(CLASSES):
        (tmp_path / f"in/{name}.tar").write_bytes(class_tar(label))
    run_convert(tmp_path / "in", tmp_path / "out")
    assert "12 images without labels; if each tar is a class, run `tar -cf all.tar" in capsys.readouterr().out


def test_images_and_other_tars_next_to_the_tars_of_a_split_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = sources.class_folders(tmp_path / "in")
    for name in ("train-0", "train-1", "val-0", "trains"):
        (root / f"{name}.tar").write_bytes(class_tar(0))
    run_convert(root, tmp_path / "out", "--layout", "tars")
    said = capsys.readouterr().out
    assert "not of the train split and left out: 2 tars" in said
    assert "left out next to the tars: 24 images" in said
    assert len(stored_samples(tmp_path / "out/train")) == 8


def test_our_own_shards_are_read_again_under_their_name_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_convert(sources.class_folders(tmp_path / "animals"), tmp_path / "first", "--num-shards", "2")
    capsys.readouterr()
    again = run_convert(first, tmp_path / "again")
    assert "left out" not in capsys.readouterr().out
    assert assert_colours_tell_labels(again, 24) == [0, 1, 2]
    assert '"bee"' in (again / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.tar", sources.tar_bytes([("b.tar", class_tar(0))]))], "a.tar contains a tar itself (b.tar)"),
        ([("a/x.tar", class_tar(0)), ("b/X.tar", class_tar(1))], "two classes with one name, 'x' and 'X'"),
        ([("A/1.jpg", b"x"), ("a /1.jpg", b"x")], "two classes with one name, 'A' and 'a '"),
        ([("a.tar", b"no tar" * 1000)], "no tar header at byte 512"),
    ],
)
def test_a_tar_that_cannot_be_labelled_is_refused(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tar").write_bytes(sources.tar_bytes(members))
    assert main(["convert", str(tmp_path / "x.tar"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
