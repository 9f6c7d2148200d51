"""A newcomer's own images, as they are on disk: nothing is dropped and no label is guessed silently."""

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import sources
from PIL import Image
from reading import run_convert, stored_samples

from pipeline.text import notify_after
from tools.make_shards import main
from tools.shards.formats import AVIF_IS_READ, HEIC_IS_READ


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three folders of eight images, and five next to them."""
    root = sources.class_folders(tmp_path / "photos")
    for number in range(5):
        (root / f"IMG_{number}.JPG").write_bytes(sources.picture(4, number))
    return root


def said(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str) -> str:
    run_convert(source, out, *options)
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["convert", str(source), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(source) in error
    return error


def test_folders_with_images_next_to_them_are_no_classes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(capsys, photos, tmp_path / "out").splitlines()[0]
    assert line.startswith("layout   flat (29 images without labels: 5 lie next to the folders")
    assert "--layout folders" in line
    assert [sample.label for sample in stored_samples(tmp_path / "out/train")] == [-1] * 29


def test_folders_that_are_asked_for_are_classes_and_the_rest_is_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "left out next to the folders: 5 images" in said(capsys, photos, tmp_path / "a", "--layout", "folders")
    assert len(stored_samples(tmp_path / "a/train")) == 24
    assert "29 images without labels" in said(capsys, photos, tmp_path / "b", "--layout", "flat")


def test_what_lies_next_to_the_folder_of_a_split_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train").mkdir()
    (photos / "ant").rename(photos / "train/ant")
    assert "images below train/; 21 elsewhere, of other splits or masks, are left out" in said(capsys, photos, tmp_path / "out")


FOREIGN = ("a.HEIF", "b.heif", "c.CR2", "d.mp4", "e", "f.tar.gz")
QUIET = (".DS_Store", "._a.jpg", "Thumbs.db", "desktop.ini", "g.txt", "h.json", "i.XML", "j.csv", "k.md", "l.idx", "LICENSE")


@pytest.mark.skipif(HEIC_IS_READ, reason="pillow-heif is installed, so .heif is read")
@pytest.mark.parametrize("form", ["folders", "flat", "tar", "tar in a tar"])
def test_files_that_are_not_images_are_reported_by_kind(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sources.class_folders(tmp_path / "in")
    for name in (*FOREIGN, *QUIET):
        (root / "ant" / name).write_bytes(b"0")
    source = {"folders": root, "flat": root / "ant"}.get(form, tmp_path / "x.tar")
    if form.startswith("tar"):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        members = [(str(path.relative_to(root)), path.read_bytes()) for path in files]
        content = sources.tar_bytes(members)
        source.write_bytes(sources.tar_bytes([("in.tar", content)]) if form == "tar in a tar" else content)
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(lines) == 1
    listed, _, rest = lines[0].removeprefix("left out: ").partition(": unsupported formats (supported: jpg, png")
    assert set(listed.split(", ")) == {"2 .heif", "1 .cr2", "1 .mp4", "1 without an extension", "1 .tar.gz"}
    assert "HEIC or AVIF: `pip install -U pillow pillow-heif`" in rest
    assert "unpack .tar.gz first" in rest


def test_a_folder_without_images_is_no_class_and_a_single_class_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = sources.class_folders(tmp_path / "in/mine")
    (root / "dog").mkdir()
    assert "3 class folders in" in said(capsys, root, tmp_path / "a")
    assert f"all images have one label: if the folders in {root} are the classes" in said(capsys, tmp_path / "in", tmp_path / "b")


def test_nothing_is_said_of_texts_and_hidden_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sources.class_folders(tmp_path / "in")
    for name in QUIET:
        (root / "bee" / name).write_bytes(b"0")
        (root / name).write_bytes(b"0")
    assert "left out" not in said(capsys, root, tmp_path / "out")
    assert len(stored_samples(tmp_path / "out/train")) == 24


def test_links_to_folders_are_followed_to_other_places_and_else_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = sources.class_folders(tmp_path / "in")
    (root / "ant/more").symlink_to(root / "bee")
    (root / "ant/gone.jpg").symlink_to(root / "nowhere")
    sources.class_folders(tmp_path / "elsewhere", classes=["dog"])
    (root / "dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "elsewhere/dog/loop").symlink_to(tmp_path / "elsewhere")
    line = said(capsys, root, tmp_path / "out").splitlines()[1]
    assert line == "left out: 2 folder link(s), not followed, 1 broken link(s)"
    assert {sample.name[:4] for sample in stored_samples(tmp_path / "out/train")} == {"ant/", "bee/", "cat/", "dog/"}


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def flat_image(color: str, image_format: str = "PNG", side: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), color).save(out, image_format)
    return out.getvalue()


def test_degenerate_images_and_labels_are_said_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"ant/{n}.jpg": sources.picture(0, n) for n in range(5)} | {"ant/copy.JPG": sources.picture(0, 3)}
    files |= {
        "bee/red.png": flat_image("red"),
        "bee/blue.jpg": flat_image("blue", "JPEG", 500),
        "bee/red.bmp": flat_image("red", "BMP"),
    }
    files["cat/0.jpg"] = sources.picture(2, 0)
    train = write_files(tmp_path / "train", files)
    lines = said(capsys, train, tmp_path / "out").splitlines()
    assert [line for line in lines if line.startswith("note")] == [
        "note     train: changed by the rules of docs/pipeline.md: 1 bmp",
        "note     train: 3 of 10 images have one colour: bee/red.png, bee/blue.jpg, bee/red.bmp",
        "note     train: 2 of 10 images are copies of others",
        "note     train: classes with a single image: cat",
    ]
    val = write_files(tmp_path / "val", {name: content for name, content in files.items() if name.startswith("ant/")})
    lines = said(capsys, val, tmp_path / "out", "--split", "val").splitlines()
    assert lines[-2:] == [
        "note     val: 6 of 6 images are also in train, which flatters accuracies",
        "note     val: all images have one label, so accuracies will mean nothing",
    ]


def test_sound_images_are_not_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "note" not in said(capsys, sources.class_folders(tmp_path / "in"), tmp_path / "out", "--val-ratio", "0.25")


@pytest.mark.skipif(not AVIF_IS_READ, reason="this Pillow was built without AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.AVIF").write_bytes(sources.picture(3, 0, image_format="AVIF"))
    (sample,) = stored_samples(run_convert(tmp_path / "in", tmp_path / "out"))
    assert sample.extension == "png"
    assert sample.pixels().shape == (40, 56, 3)


@pytest.mark.skipif(not HEIC_IS_READ, reason="pillow-heif is not installed")
def test_heic_is_read_upright(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pillow_heif import from_pillow

    upright = Image.new("RGB", (64, 48), (200, 30, 30))
    upright.paste((20, 20, 220), (0, 0, 32, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side, as a phone that is held upright stores it
    buffer = io.BytesIO()
    heic = from_pillow(upright.transpose(Image.Transpose.ROTATE_90))
    heic.save(buffer, quality=95, exif=exif.tobytes())
    (tmp_path / "in").mkdir()
    for name in ("IMG_1.HEIC", "IMG_2.jpg"):
        (tmp_path / "in" / name).write_bytes(buffer.getvalue())
    assert "left out" not in said(capsys, tmp_path / "in", tmp_path / "out", "--resize", "40")
    samples = stored_samples(tmp_path / "out/train")
    assert len(samples) == 2
    for sample in samples:
        assert sample.pixels().shape == (40, 53, 3)
        assert sample.pixels()[20, 10, 2] > 150 > 100 > sample.pixels()[20, 45, 2]


@pytest.mark.parametrize(
    ("name", "head", "advice"),
    [
        ("x.tar.gz", b"\x1f\x8b\x08", "`gunzip -k x.tar.gz`"),
        ("x.zip", b"PK\x03\x04", "`unzip x.zip`"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c", "`7z x x.7z`"),
        ("x.rar", b"Rar!\x1a\x07\x00", "`unrar x x.rar`"),
        ("x.tar", b"\x1f\x8b\x08", "`gunzip -k x.tar`"),
    ],
)
def test_a_compressed_archive_says_how_to_unpack_it(
    name: str, head: bytes, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(head + bytes(2_000))
    error = refused(capsys, tmp_path / name, tmp_path / "out")
    assert f"unpack it first: {advice}" in error
    if name == "x.tar":
        assert advice in refused(capsys, tmp_path, tmp_path / "out")


def npz() -> bytes:
    np.savez(buffer := io.BytesIO(), x_train=np.zeros((2, 4, 4), np.uint8))
    return buffer.getvalue()


def tiff(bands: int) -> bytes:
    entries = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8), (277, bands), (278, 4), (279, 16 * bands)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4 + 16 * bands)


KNOWN = {
    "dcm": (bytes(128) + b"DICM" + bytes(200), "DICOM"),
    "jxl": (b"\xff\x0a" + bytes(200), "JPEG XL"),
    "npz": (npz(), "NumPy arrays"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a pointer of Git LFS"),
    "html": (b"\n<!doctype html><html></html>", "an HTML page"),
    "tif": (tiff(13), "a TIFF of 13 bands"),
    "zip": (b"PK\x03\x04" + bytes(100), "compressed with zip"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_files_of_known_formats_are_called_by_their_names(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, name = KNOWN[kind]
    root = write_files(tmp_path / "in", {"a/x.jpg": content, f"a/y.{kind}": content})
    assert main(["convert", str(root), "--out", str(tmp_path / "out")]) == 2
    assert f": {name}, " in capsys.readouterr().err
    (root / "a/x.jpg").write_bytes(sources.picture(0, 0))
    if kind in ("dcm", "jxl", "npz"):
        assert f"1 .{kind}" in (told := said(capsys, root, tmp_path / "b"))
        assert f"{name}: " in told
    if kind != "tif":
        assert name in refused(capsys, root / f"a/y.{kind}", tmp_path / "c")


def test_a_source_without_images_says_what_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    root.mkdir()
    assert "no train images found: it is empty" in refused(capsys, root, tmp_path / "out")
    for name in ("a.psd", "b.psd", "c.mp4"):
        (root / name).write_bytes(b"0")
    seen = "3 files, none of them an image in a supported format: 2 .psd, 1 .mp4"
    assert seen in refused(capsys, root, tmp_path / "out")
    (tmp_path / "x.tar").write_bytes(sources.tar_bytes([(name, b"0") for name in ("a.psd", "b.psd", "c.mp4")]))
    assert seen in refused(capsys, tmp_path / "x.tar", tmp_path / "out", "--val-ratio", "0.1")
    image = sources.class_folders(tmp_path / "c") / "ant/ant.0.JPEG"
    assert "one image, convert the folder" in refused(capsys, image, tmp_path / "out")


def test_shards_among_the_images_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(photos / "shards") in refused(capsys, photos, photos / "shards")
    assert not (photos / "shards").exists()


def test_a_long_wait_is_told_and_a_short_one_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with notify_after(60, "short"):
        pass
    with notify_after(0.01, "listing the images ..."):
        time.sleep(0.5)
    assert capsys.readouterr().err == "listing the images ...\n"
