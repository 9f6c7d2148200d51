"""Side files are outside input: whatever they hold, the answer is their content or one line with their name."""

import json
from pathlib import Path

import pytest

from pipeline.shards.index import open_index
from pipeline.shards.manifest import check_class_count, read_manifest
from tests.conftest import write_shards

WHOLE = {"format_version": 1, "name": "photos", "classes": ["ant", "bee"], "num_samples": 4, "shards": []}
DAMAGES = (
    "", "null", "5", "[]", "{", '"classes"', "[" * 100_000, '{"classes": 5}', '{"classes": null}', '{"classes": [1, 2]}',
    '{"classes": "ant"}', '{"classes": [], "shards": 5}', '{"classes": [], "shards": [{"name": "a.tar"}]}',
    '{"classes": [], "num_samples": "4"}', '{"classes": [], "name": {}}',
)  # fmt: skip


@pytest.mark.parametrize("text", DAMAGES, ids=lambda text: text[:30])
def test_a_damaged_manifest_is_one_line_with_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="damaged") as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "manifest.json"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_bytes_that_are_no_text_are_damage_too(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        read_manifest(tmp_path)


def test_a_manifest_is_read_and_one_of_another_program_is_passed_over(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": "shards.txt", "version": 3}))
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert (manifest.name, manifest.classes, manifest.num_samples) == ("photos", ("ant", "bee"), 4)


@pytest.mark.parametrize(("classes", "enough"), [(["ant"], False), (["ant", "bee"], True), ([], True)])
def test_labels_without_a_name_are_reported(classes: list[str], enough: bool, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "train", [4])  # labels 0 and 1
    (folder / "manifest.json").write_text(json.dumps({**WHOLE, "classes": classes}))
    manifest = read_manifest(folder)
    assert manifest is not None
    if enough:
        check_class_count(folder, open_index(folder).samples["label"], manifest)
        return
    with pytest.raises(ValueError, match="names 1 classes, but labels go up to 1"):
        check_class_count(folder, open_index(folder).samples["label"], manifest)
