"""The files that a conversion leaves for the next one: damaged, they are one line or written again, never a traceback."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import sources
from reading import folder_bytes, run_convert

from tools.make_shards import main


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source, `in`, and of its shards, `out`."""
    root = tmp_path_factory.mktemp("side_files")
    run_convert(sources.class_folders(root / "in"), root / "out", "--num-shards", "2")
    return root


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out" / "train"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    progress, error, rest = capsys.readouterr().err.partition("make_shards: ")
    assert rest.count("\n") == 1
    assert "Traceback" not in progress
    return error + rest


@pytest.mark.parametrize("text", ["", "null", "5", "{"])
def test_a_damaged_manifest_is_named_and_a_second_conversion_repairs_it(
    text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folder_bytes(folder)
    (folder / "manifest.json").write_text(text)
    assert str(folder / "manifest.json") in refused(capsys, "verify", str(folder), "--workers", "1")
    run_convert(tmp_path / "in", tmp_path / "out", "--num-shards", "2")
    assert folder_bytes(folder) == before


@pytest.mark.parametrize(("classes", "says"), [(5, "classes is 5"), (None, "classes is null"), (["ant"], "names 1 classes")])
def test_verify_and_a_conversion_of_the_shards_name_a_wrong_class_list(
    classes: object, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": classes}))
    capsys.readouterr()
    assert main(["verify", str(folder), "--workers", "1"]) == 2
    assert says in capsys.readouterr().err
    if not isinstance(classes, list):
        assert says in refused(capsys, "convert", str(folder), "--out", str(folder.parent / "again"))


@pytest.mark.parametrize("text", ["", "null", "{"])
def test_a_damaged_plan_is_one_line(text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".records/plan.json").write_text(text)
    error = refused(capsys, "convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--num-shards", "2")
    assert "plan.json: damaged" in error
    assert f"Remove {folder}" in error


@pytest.mark.parametrize("part", ["rows", "digests", "meta", "all"])
def test_a_damaged_record_is_written_again(part: str, folder: Path, tmp_path: Path) -> None:
    before, record, kept = folder_bytes(folder), folder / ".records/000001.npz", io.BytesIO()
    if part != "all":
        with zipfile.ZipFile(record) as old, zipfile.ZipFile(kept, "w") as new:
            for name in set(old.namelist()) - {f"{part}.npy"}:
                new.writestr(name, old.read(name))
    record.write_bytes(kept.getvalue())
    options = ("--num-shards", "2")
    run_convert(tmp_path / "in", tmp_path / "out", *options)
    assert folder_bytes(folder) == before
