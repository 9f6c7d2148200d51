"""Several sets taken for one, and images that only `convert` reads: named in one line, with what to do."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.shards.index import open_index, save_index
from pipeline.shards.index_file import INDEX_FILES
from pipeline.shards.tar import CONVERTIBLE, IMAGE_EXTENSIONS
from tests.conftest import write_shards
from tests.pipeline.shards.conftest import write_manifest
from tools.make_shards import main
from tools.shards.formats import EXTENSIONS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_shards(tmp_path / "set" / "train", [5, 4, 3])
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)
    write_manifest(folder, index)
    change_manifest(folder, lambda manifest: manifest | {"classes": ["a", "b"], "num_samples": 12})
    return folder


def change_manifest(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def add_foreign_tar(folder: Path) -> None:
    shutil.copy(write_shards(folder.parent.parent / "other", [2]) / "photos-000000.tar", folder / "more-000000.tar")


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tars of a second conversion": (add_foreign_tar, "more-000000.tar is not of its conversion.* a folder of its own"),
    "fewer tars": (lambda f: (f / "photos-000002.tar").unlink(), "photos-000002.tar is missing"),
    "a tar of another size": (
        lambda f: (f / "photos-000001.tar").write_bytes((f / "photos-000001.tar").read_bytes() + bytes(512)), "instead of",
    ),
    "another count": (lambda f: change_manifest(f, lambda m: m | {"num_samples": 11}), "12 images instead of 11"),
}  # fmt: skip


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_manifest_that_does_not_fit_its_tars_is_one_line_wherever_they_are_opened(
    misfit: str, is_indexed: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = MISFITS[misfit]
    change(folder)
    if not is_indexed:
        for name in INDEX_FILES:
            (folder / name).unlink()
    elif misfit == "fewer tars":
        words = "photos-000002.tar: listed in the index but missing"  # the index is compared first
    with pytest.raises(ValueError, match=words) as caught:
        open_index(folder)
    assert "\n" not in str(caught.value)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for command in ("index", "verify"):  # the index that was recommended would give labels two meanings
        assert main([command, str(folder), "--workers", "1"]) == 2
        said = capsys.readouterr().err
        assert "manifest.json: of other tars than these" in said or words in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_a_manifest_the_tars_are_as_good_as_any(folder: Path) -> None:
    add_foreign_tar(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"1 more .*include them\. Rebuild it"):
        open_index(folder)
    assert main(["index", str(folder), "--workers", "1"]) == 0
    assert len(open_index(folder)) == 14


def test_two_names_of_one_tar_do_not_count_twice(tmp_path: Path) -> None:
    blob = write_shards(tmp_path / "blobs", [3]) / "photos-000000.tar"
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).symlink_to(blob)
    with pytest.raises(ValueError, match=r"b\.tar: the same file as a\.tar: its images would count twice"):
        open_index(tmp_path)
    assert main(["index", str(tmp_path), "--workers", "1"]) == 2
    (tmp_path / "b.tar").unlink()
    assert len(open_index(tmp_path)) == 3


def test_two_snapshots_of_a_hub_cache_are_refused_and_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "datasets--me--photos"
    blob = write_shards(cache / "blobs", [4]) / "photos-000000.tar"
    for revision in ("aaa", "bbb"):
        (cache / "snapshots" / revision).mkdir(parents=True)
        (cache / "snapshots" / revision / "photos.tar").symlink_to(blob)
    for source in (cache, cache / "snapshots"):
        assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "2 snapshots of one data set" in said
        assert f"Give one of them, such as the newest: {cache / 'snapshots'}" in said
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(cache / "snapshots" / "bbb"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(open_index(tmp_path / "out" / "train")) == 4


def mixed_tar(path: Path, extensions: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, extension in enumerate(extensions):
            image = io.BytesIO()
            Image.new("RGB", (16, 12), (9 * number, 0, 0)).save(image, {"jpg": "JPEG", "webp": "WEBP"}[extension])
            info = tarfile.TarInfo(f"{number:03d}.{extension}")
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))


def test_images_that_only_convert_reads_are_counted_and_convert_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed_tar(tmp_path / "mixed" / "a.tar", ["jpg", "jpg", "webp"] * 8)
    assert main(["index", str(tmp_path / "mixed"), "--workers", "1"]) == 0
    said = capsys.readouterr()
    convert = f"`python tools/make_shards.py convert {tmp_path / 'mixed'} --out SHARDS` reads them too"
    assert f"8 .webp images next to 16 jpg, jpeg or png are left out: {convert}" in said.err
    assert "16 samples indexed" in said.out
    mixed_tar(tmp_path / "webp" / "a.tar", ["webp"] * 8)
    with pytest.raises(ValueError, match=r"8 \.webp images and no jpg, jpeg or png: `python tools/make_shards\.py convert "):
        open_index(tmp_path / "webp")
    for name, count in (("mixed", 24), ("webp", 8)):
        assert main(["convert", str(tmp_path / name), "--out", str(tmp_path / f"{name}-out"), "--workers", "1"]) == 0
        assert len(open_index(tmp_path / f"{name}-out" / "train")) == count


def test_every_format_of_convert_is_taken_or_named() -> None:
    assert {extension.removeprefix(".") for extension in EXTENSIONS} <= CONVERTIBLE | IMAGE_EXTENSIONS


def test_index_says_when_tars_of_several_sets_share_their_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, counts in (("a", [4, 4]), ("b", [4])):
        write_shards(tmp_path / name, counts)
    for path in (tmp_path / "b").glob("*.tar"):
        path.rename(tmp_path / "a" / path.name.replace("photos", "others"))
    assert main(["index", str(tmp_path / "a")]) == 0
    said = capfd.readouterr()
    assert "tars of 2 sets (others, photos)" in said.err
    assert "12 samples indexed" in said.out
