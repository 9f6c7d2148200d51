"""A data_path without shards is answered with what to do, by what is there."""

from pathlib import Path

import pytest

from pipeline.shards.index import split_folder

FORMS = {
    **dict.fromkeys(
        ("shards/*.tar", "shards/x-{000000..000123}.tar", "pipe:aws s3 cp s3://b/x.tar -", "ftp://host/set"),
        "patterns, commands and this kind of URL are not read. Name the folder of the shards",
    ),
    "nowhere": "nowhere/train: no shards (*.tar) here. Set data_path to a folder of pictures, or run "
    "`python tools/make_shards.py convert SOURCE --out nowhere",
    "empty": "empty/train: no shards (*.tar) here. Set data_path to",
}


@pytest.mark.parametrize("place", FORMS)
def test_each_kind_of_path_has_its_advice(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        split_folder("custom", place, "train")
    assert FORMS[place] in str(caught.value)
    assert str(caught.value).startswith(place)


def test_a_missing_val_split_is_not_made_of_train(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"--split val`; where the images have no such split, .*`--val-ratio"):
        split_folder("custom", tmp_path, "val")
