"""A label means the same class in both splits of a data set, however each of them came."""

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import sources
from reading import assert_colours_tell_labels, run_convert, stored_samples

from tools.make_shards import main
from tools.shards.labels import class_order

NUMBERS = [str(number) for number in range(12)]


def folders(root: Path, names: Sequence[str], colours: Sequence[int] | None = None) -> Path:
    """Three images for each class, of the colour of its place in `names` unless `colours` are given."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(3):
            colour, picture = (place, number) if colours is None else (colours[place], number + 3)
            (root / name / f"{number}.jpg").write_bytes(sources.picture(colour, picture))
    return root


def labelled_tar(path: Path, labels: Sequence[int], colours: Sequence[int] | None = None) -> Path:
    members = []
    for place, label in enumerate(labels):
        colour = label if colours is None else colours[place]
        members += [(f"{place:04d}.jpg", sources.picture(colour, place)), (f"{place:04d}.cls", b"%d" % label)]
    path.write_bytes(sources.tar_bytes(members))
    return path


def classes_of(folder: Path) -> list[str]:
    return json.loads((folder / "manifest.json").read_text())["classes"]


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, split: str) -> str:
    capsys.readouterr()
    assert main(["convert", str(source), "--out", str(out), "--split", split, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (NUMBERS, NUMBERS),
        (["10", "9", "-1", "010"], ["-1", "9", "010", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["1" * 30, "2"], ["1" * 30, "2"]),  # no number that a label could hold
    ],
)
def test_names_that_are_all_integers_sort_as_numbers(names: list[str], order: list[str]) -> None:
    assert class_order(random.Random(0).sample(names, len(names))) == order


def test_integer_folders_and_a_tar_of_integer_labels_agree(tmp_path: Path) -> None:
    train = run_convert(folders(tmp_path / "in", NUMBERS), tmp_path / "out")
    val = run_convert(labelled_tar(tmp_path / "val.tar", range(12)), tmp_path / "out", "--split", "val")
    for folder, count in ((train, 36), (val, 12)):
        assert classes_of(folder) == NUMBERS
        assert assert_colours_tell_labels(folder, count) == list(range(12))


@pytest.mark.parametrize("form", ["folders in a tar", "tars in a tar"])
def test_integers_in_tars_sort_as_numbers_too(form: str, tmp_path: Path) -> None:
    members = [(f"{name}/1.jpg", sources.picture(label, 0)) for label, name in enumerate(NUMBERS)]
    if form == "tars in a tar":
        members = [(f"{name.partition('/')[0]}.tar", sources.tar_bytes([("1.jpg", image)])) for name, image in members]
    (tmp_path / "x.tar").write_bytes(sources.tar_bytes(members))
    assert_colours_tell_labels(run_convert(tmp_path / "x.tar", tmp_path / "out"), 12)


def test_a_number_names_the_folder_of_that_number_and_not_the_place_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_convert(folders(tmp_path / "in", NUMBERS[1:]), tmp_path / "out")  # class 1 has label 0
    val = labelled_tar(tmp_path / "val.tar", range(1, 12), range(11))
    assert_colours_tell_labels(run_convert(val, tmp_path / "out", "--split", "val"), 11)
    zero = labelled_tar(tmp_path / "zero.tar", range(12))
    assert "lacks 1 class of the val images: 0." in refused(capsys, zero, tmp_path / "out", "val")


def test_folders_next_to_a_split_that_has_numbers_and_no_names(tmp_path: Path) -> None:
    run_convert(labelled_tar(tmp_path / "train.tar", range(1, 13)), tmp_path / "out")
    val = folders(tmp_path / "in", [str(number) for number in range(1, 13)], range(1, 13))
    assert_colours_tell_labels(run_convert(val, tmp_path / "out", "--split", "val"), 36)


def test_a_split_without_some_classes_keeps_the_labels_of_the_other(tmp_path: Path) -> None:
    run_convert(folders(tmp_path / "in", ["ant", "bee", "cat"]), tmp_path / "out")
    val = run_convert(folders(tmp_path / "val", ["ant", "cat"], [0, 2]), tmp_path / "out", "--split", "val")
    assert classes_of(val) == ["ant", "bee", "cat"]
    assert assert_colours_tell_labels(val, 6) == [0, 2]


def test_a_name_in_another_case_or_unicode_form_is_the_same_class(tmp_path: Path) -> None:
    names = ["Ärger", "cat", "zoo"]
    run_convert(folders(tmp_path / "in", sorted(names)), tmp_path / "out")
    order = sorted(names)
    others = [unicodedata.normalize("NFD", "Ärger"), "CAT", "Zoo"]
    val = folders(tmp_path / "val", others, [order.index(name) for name in names])
    assert_colours_tell_labels(run_convert(val, tmp_path / "out", "--split", "val"), 9)


def test_unknown_classes_are_refused_whichever_split_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = folders(tmp_path / "small", ["ant", "cat"]), folders(tmp_path / "large", ["ant", "bee", "cat"])
    (small / "dog").mkdir()  # without images: no class of this split
    run_convert(small, tmp_path / "out")
    error = refused(capsys, large, tmp_path / "out", "val")
    assert f"{tmp_path / 'out/train'}: lacks 1 class of the val images: bee." in error
    assert not (tmp_path / "out/val").exists()
    run_convert(small, tmp_path / "other", "--split", "val")
    assert "convert train first" in refused(capsys, large, tmp_path / "other", "train")


def test_numbers_next_to_names_are_places_in_the_list_and_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = run_convert(folders(tmp_path / "in", ["ant", "bee", "cat"]), tmp_path / "out")
    capsys.readouterr()
    val = run_convert(labelled_tar(tmp_path / "v.tar", [2, 0, 1]), tmp_path / "out", "--split", "val")
    assert f"labels taken for the places in the class list of {train}" in capsys.readouterr().out.splitlines()[0]
    assert assert_colours_tell_labels(val, 3) == [0, 1, 2]
    beyond = labelled_tar(tmp_path / "w.tar", [0, 3])
    assert "lacks 1 class of the val images: 3." in refused(capsys, beyond, tmp_path / "out", "val")


def test_random_class_names_keep_their_colours_through_both_splits(tmp_path: Path) -> None:
    """Property: whatever the names, and whichever classes val has, pixels tell the label in both splits."""
    rng = random.Random(5)
    for trial in range(6):
        pool = NUMBERS if trial % 2 else ["a b", "Z", "ö", "x.y", "10", "9", "_", "né", "日本", "q-1", "1e3", "007"]
        names = class_order(rng.sample(pool, rng.randint(3, 12)))
        out = tmp_path / f"out{trial}"
        train = run_convert(folders(tmp_path / f"in{trial}", names), out)
        some = rng.sample(names, rng.randint(2, len(names)))
        val = folders(tmp_path / f"val{trial}", some, [names.index(name) for name in some])
        assert_colours_tell_labels(train, 3 * len(names))
        assert_colours_tell_labels(run_convert(val, out, "--split", "val"), 3 * len(some))
        assert {sample.label for sample in stored_samples(out / "val")} == {names.index(name) for name in some}


def test_the_same_conversions_again_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (("--val-ratio", "0.3"), ("--val-ratio", "0.3")):
        capsys.readouterr()
        run_convert(tmp_path / "in" if (tmp_path / "in").exists() else folders(tmp_path / "in", NUMBERS), tmp_path / "o",
                    *options)  # fmt: skip
    assert capsys.readouterr().out.count("already complete, nothing to do") == 2
