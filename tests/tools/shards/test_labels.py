"""Labels from a file next to the images, and none on request."""

import json
from pathlib import Path

import pytest
import sources
from reading import assert_colours_tell_labels, run_convert, stored_samples

from tools.make_shards import main

FORMS = {
    "tiny-imagenet": ("val_{n}.JPEG\t{wnid}\t0\t32\t44\t62\n", "", "images/val_{n}.JPEG"),
    "caffe": ("ILSVRC2012_val_{n:08d}.JPEG {label}\n", "", "ILSVRC2012_val_{n:08d}.JPEG"),
    "blanks in names": ("my photo {n}.jpg {label}\n", "", "a/my photo {n}.jpg"),
    "kaggle": ("{n},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n", "ImageId,PredictionString\n", "{n}.JPEG"),
    "without extensions": ('{n},"{wnid}"\n', "id,breed\n", "{n}.jpg"),
    "columns by name": ("{wnid},x,./a/{n}.jpg\n", "\ufeffLabel,Other,Filename\n", "a/{n}.jpg"),
    "other folders": ("old/place/{n}.jpg,{wnid}\n", "", "{n}.jpg"),
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("form", FORMS)
def test_labels_come_from_every_usual_form_of_list(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, header, name = FORMS[form]
    wnids, text = ("n00000001", "n00000002", "n00000003"), header
    for n in range(9):
        write(tmp_path / "in" / name.format(n=n), sources.picture(n % 3, n))
        text += line.format(n=n, label=n % 3, wnid=wnids[n % 3]) if n < 8 else ""
    labels = tmp_path / "labels.txt"
    labels.write_text(text + line.format(n=99, label=1, wnid=wnids[1]))
    folder = run_convert(tmp_path / "in", tmp_path / "out", "--labels", str(labels))
    samples = stored_samples(folder)
    assert sum(sample.label == -1 for sample in samples) == 1
    assert "labels of 8 of 9 images from labels.txt, 1 lines of which name no image" in capsys.readouterr().out
    assert json.loads((folder / "manifest.json").read_text())["classes"] == ([] if "label}" in line else list(wnids))
    write(tmp_path / "more" / name.format(n=8), sources.picture(1, 8))
    labels.write_text(header + line.format(n=8, label=1, wnid=wnids[1]))
    val = run_convert(tmp_path / "more", tmp_path / "out", "--split", "val", "--labels", str(labels))
    assert assert_colours_tell_labels(val, 1) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no line names an image"), ("nothing.jpg,1\n", "no line names an image"), ("0.jpg\n", "is no line with the name"),
     ("0.jpg,1\n0.jpg,2\n", "0.jpg names an image with two labels"), ("0.jpg,1 2\n", "is no line with the name"),
     ("1.jpg,1\n", "1.jpg names several images: a/1.jpg, b/1.jpg")],
)  # fmt: skip
def test_a_list_that_is_not_clear_is_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/0.jpg", "a/1.jpg", "b/1.jpg"):
        write(tmp_path / "in" / name, sources.picture(0, 0))
    (tmp_path / "labels.csv").write_text(text)
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--labels", str(tmp_path / "labels.csv")]
    assert message in refused(capsys, *arguments)
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    assert "no list of images and labels" in refused(capsys, *arguments)


def test_labels_are_left_out_on_request(tmp_path: Path) -> None:
    folder = run_convert(sources.class_folders(tmp_path / "in"), tmp_path / "out", "--no-labels")
    assert [sample.label for sample in stored_samples(folder)] == [-1] * 24
    assert json.loads((folder / "manifest.json").read_text())["classes"] == []


def test_train_and_val_of_the_same_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = sources.class_folders(tmp_path / "in"), tmp_path / "out"
    run_convert(source, out)
    error = refused(capsys, str(source), "--out", str(out), "--split", "val")
    assert f"{out}/val: would hold the same images as {out}/train" in error
    assert "--val-ratio 0.1" in error
    run_convert(source, out)
