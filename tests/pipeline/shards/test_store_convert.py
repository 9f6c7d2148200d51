"""`convert --out s3://...`: the store gets the files of a local conversion, and never half a data set."""

from pathlib import Path

import pytest

from pipeline.shards.index import INDEX_NAME, open_index, split_folder
from pipeline.shards.storage import read_whole
from tests.conftest import photographs
from tests.pipeline.shards.conftest import Store
from tools.make_shards import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number, image in enumerate(photographs(24)):
        path = folder / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


def convert(source: Path, out: str, *options: str) -> int:
    return main(["convert", str(source), "--out", out, "--num-shards", "3", "--workers", "1", *options])


def test_the_store_gets_the_files_of_a_local_conversion_and_the_manifest_last(
    store: Store, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, staging = "s3://photos/converted", ("--staging", str(tmp_path / "staging"))
    assert convert(source, str(tmp_path / "local")) == 0
    before = len(store.proxy.requests)
    assert convert(source, url, *staging) == 0
    local = tmp_path / "local" / "train"
    names = [path.name for path in local.iterdir() if path.is_file()]
    assert len(names) == 3 + 4
    for name in names:
        assert read_whole(f"{url}/train/{name}", 1 << 30) == (local / name).read_bytes(), name
    written = [request.rpartition("/")[2] for request in store.proxy.requests[before:] if request.startswith("PUT")]
    assert written[-2:] == [INDEX_NAME, "manifest.json"]
    assert open_index(split_folder("custom", url, "train")).shards == open_index(local).shards
    capsys.readouterr()
    assert convert(source, url, *staging) == 0
    assert "already complete" in capsys.readouterr().out.splitlines()[-1]


def test_an_upload_that_fails_is_continued_and_cannot_be_read_before(
    store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.shards.upload.RETRY_S", 0.3)
    url, staging = "s3://photos/continued", ("--staging", str(tmp_path / "staging"))
    store.proxy.fault = lambda _, path: "503" if "000002.tar" in path else ""
    assert convert(source, url, *staging) == 2
    with pytest.raises(FileNotFoundError):
        split_folder("custom", url, "train")
    store.proxy.fault = lambda *_: ""
    before = len(store.proxy.requests)
    assert convert(source, url, *staging) == 0
    written = [request for request in store.proxy.requests[before:] if request.startswith("PUT") and ".tar" in request]
    assert len(written) == 1
    assert len(open_index(split_folder("custom", url, "train"))) == 24


def test_other_shards_in_the_store_are_not_mixed(
    store: Store, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, store.url, "--staging", str(tmp_path)) == 2
    assert "holds other shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("https://host/set", (), "is read-only"),
        ("s3://", (), "write s3://BUCKET/PREFIX"),
        ("s3://b/p", ("--num-tasks", "2"), "needs --staging"),
    ],
)
def test_what_cannot_be_written_is_refused(
    source: Path, out: str, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, out, *options) == 2
    assert words in capsys.readouterr().err
