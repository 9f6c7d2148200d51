"""Parquet of every usual form: the labels that went in, or one line with file and column."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sources
from reading import assert_colours_tell_labels, run_convert, stored_samples

from tools.make_shards import main

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LABELS = [0, 2, 1, 1, 0, 2]


def images(labels: list[int] = LABELS) -> list[dict[str, Any]]:
    return [{"bytes": sources.picture(label, n), "path": "x.jpg"} for n, label in enumerate(labels)]


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)
    return path


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["convert", str(source), "--out", str(out), "--workers", "1", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


FORMS = {
    "image and label": {"image": images(), "label": LABELS},
    "img and fine_label": {"coarse_label": [0] * 6, "fine_label": LABELS, "img": images()},
    "bytes and labels": {"bytes": [image["bytes"] for image in images()], "labels": LABELS},
    "one struct by another name": {"scan": images(), "label": LABELS},
    "floats": {"image": images(), "label": [float(label) for label in LABELS]},
    "numbers as text": {"image": images(), "label": [str(label) for label in LABELS]},
    "names": {"image": images(), "label": [("ant", "bee", "cat")[label] for label in LABELS]},
    "a dictionary of names": {
        "image": images(),
        "label": pyarrow.array([("ant", "bee", "cat")[label] for label in LABELS]).dictionary_encode(),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_are_found_by_type_and_usual_names(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in/0.parquet", FORMS[form])
    folder = run_convert(path, tmp_path / "out")
    assert assert_colours_tell_labels(folder, 6) == [0, 1, 2]
    line = capsys.readouterr().out.splitlines()[0]
    image, label = next(
        (i, n) for i in FORMS[form] for n in ("label", "labels", "fine_label") if f"column {i}, labels from {n}" in line
    )
    assert image != label
    if "names" in form and "numbers" not in form:
        assert json.loads((folder / "manifest.json").read_text())["classes"] == ["ant", "bee", "cat"]


BAD_LABELS = {"list": [[0, 1]] * 6, "struct": [{"id": 0}] * 6, "fraction": [0.5] * 6, "huge": [10**12] * 6, "negative": [-2] * 6}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_what_is_no_label_is_left_out_and_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in/0.parquet", {"image": images(), "label": BAD_LABELS[kind]})
    folder = run_convert(path, tmp_path / "out")
    assert f"6 of which are not one number or one name, such as {str(BAD_LABELS[kind][0])!r} in row 0" in capsys.readouterr().out
    assert [sample.label for sample in stored_samples(folder)] == [-1] * 6


def test_more_labels_than_names_are_refused_before_any_shard_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    path = write(tmp_path / "in/0.parquet", {"image": images(), "label": LABELS}, features)
    assert "label 2 for 2 classes" in refused(capsys, path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_damaged_page_is_one_line_with_file_and_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in/0.parquet", {"image": images(), "label": LABELS})
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    assert f"{path}: column image, from row 0 on: cannot be read" in refused(capsys, path, tmp_path / "out")
    path.write_bytes(content[:200])
    assert f"{path}: not a readable parquet file" in refused(capsys, path, tmp_path / "out")


def test_the_tree_of_the_hub_keeps_splits_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    for split, labels in (("train", LABELS), ("validation", [0, 1]), ("test", [2])):
        write(root / f"default/{split}/0000.parquet", {"image": images(labels), "label": labels})
    assert assert_colours_tell_labels(run_convert(root, tmp_path / "out"), 6) == [0, 1, 2]
    assert assert_colours_tell_labels(run_convert(root, tmp_path / "out", "--split", "val"), 2) == [0, 1]
    write(root / "other/train/0000.parquet", {"image": images(), "label": LABELS})
    assert "several sets, default, other" in refused(capsys, root, tmp_path / "b")


def test_a_table_without_images_decides_nothing(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    write(tars / "00000.parquet", {"url": ["a", "b"], "caption": ["c", "d"]})
    members = [("0.jpg", sources.picture(1, 0)), ("0.cls", b"1"), ("1.jpg", sources.picture(2, 0)), ("1.cls", b"2")]
    (tars / "00000.tar").write_bytes(sources.tar_bytes(members))
    assert assert_colours_tell_labels(run_convert(tars, tmp_path / "a"), 2) == [1, 2]
    folders = sources.class_folders(tmp_path / "folders")
    write(folders / "metadata.parquet", {"file_name": ["a"], "label": [0]})
    assert assert_colours_tell_labels(run_convert(folders, tmp_path / "b"), 24) == [0, 1, 2]


def test_rows_without_labels_and_images_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in/0.parquet", {"image": images(), "label": [*LABELS[:5], None]})
    assert sorted(sample.label for sample in stored_samples(run_convert(path, tmp_path / "a"))) == [-1, 0, 0, 1, 1, 2]
    paths = [{"bytes": None, "path": "x.jpg"}] * 6
    column = pyarrow.array(paths, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    path = write(tmp_path / "in/0.parquet", {"image": column, "label": LABELS})
    assert "holds no image at all" in refused(capsys, path, tmp_path / "b")


def test_columns_of_other_names_are_read_if_they_hold_images_and_named_if_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = [image["bytes"] for image in images()]
    path = write(tmp_path / "in/0.parquet", {"content": content, "digest": [b"12"] * 6, "label": LABELS})
    assert_colours_tell_labels(run_convert(path, tmp_path / "a"), 6)
    encoded = [base64.b64encode(image).decode() for image in content]
    path = write(tmp_path / "in/0.parquet", {"content": encoded, "file": ["a.jpg"] * 6, "digest": [b"12"] * 6, "label": LABELS})
    for source in (path, path.parent):
        error = refused(capsys, source, tmp_path / "b")
        assert (
            "no column holds image files; its columns are content (string), file (string), digest (binary), label (int64)"
            in error
        )
