"""Shards in a store: copied once, complete and checked, and clear lines where that cannot be."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.shards.copied import copied, is_remote
from pipeline.shards.index import INDEX_NAME, open_index
from pipeline.shards.index_file import SAMPLES_NAME
from pipeline.shards.watch import StoreError
from tests.pipeline.shards.conftest import COUNTS, Store
from tests.train.test_run import command
from train.run import main

ROOT = Path(__file__).parents[3]
COPY = (
    "import sys; from pathlib import Path; from pipeline.shards.copied import copied; copied(sys.argv[1], Path(sys.argv[2]), 20)"
)


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file below a folder, by its place there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def shard_requests(store: Store) -> list[str]:
    return [request for request in store.proxy.requests if ".tar" in request]


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_schemes_are_told_from_paths() -> None:
    remote = ["s3://b/p", "gs://b/p", "az://c/p", "hf://datasets/u/r", "https://host/p"]
    assert [is_remote(place) for place in remote] == [True] * 5
    assert not any(is_remote(place) for place in ("s3:/b", "shards/mine", Path("s3://b/p"), "file://x"))


def test_the_copy_has_the_files_of_the_store_and_is_made_once(store: Store, tmp_path: Path) -> None:
    before = len(shard_requests(store))
    folder = copied(store.url, tmp_path, 20)
    assert sums(folder) == sums(store.local)
    assert len(set(shard_requests(store)[before:])) == len(shard_requests(store)[before:]) == len(COUNTS) + 1
    requests = len(store.proxy.requests)
    assert copied(f"{store.url}/", tmp_path, 20) == folder
    assert len(store.proxy.requests) - requests <= 4  # for the two indices
    train = copied(f"{store.url}/train", tmp_path, 20)
    assert sums(train) == sums(store.local / "train")


def test_a_loader_of_a_store_makes_the_crops_of_local_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, theirs = (
        build_multicrop_dataloader(
            build_multicrop_dataset("custom", place, global_crop_size=32, local_crop_size=16), 16, device="cpu", num_workers=1
        )
        for place in (store.url, store.local)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
    assert ours.state_dict() == theirs.state_dict()


def test_a_run_from_a_store_copies_trains_and_continues(store: Store, tmp_path: Path) -> None:
    arguments = command(
        ROOT / "configs" / "quickstart.yaml", Path("replaced"), tmp_path, "evaluation.max_samples=16",
        "evaluation.linear_epochs=0", f"data.data_path={store.url}", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert main([*arguments, "training.max_steps=2"]) == 0
    before = len(shard_requests(store))
    assert main([*arguments, "training.max_steps=4"]) == 0
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["steps"] == 4
    assert len(shard_requests(store)) == before


def test_all_that_ask_at_once_share_one_copy(store: Store, tmp_path: Path) -> None:
    before = len(shard_requests(store))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: copied(store.url, tmp_path, 20), range(4)))
    assert len(folders) == 1
    assert len(shard_requests(store)) - before == len(COUNTS) + 1


@pytest.mark.parametrize("kind", ["503", "500", "cut"])
def test_every_third_request_fails_and_nothing_is_lost(store: Store, tmp_path: Path, kind: str) -> None:
    store.proxy.fault = lambda number, _: kind if number % 3 == 0 else ""
    assert sums(copied(store.url, tmp_path, 20)) == sums(store.local)


@pytest.mark.parametrize(("kind", "words"), [("503", "SlowDown"), ("403", "ExpiredToken"), ("cut", "")])
def test_a_store_that_keeps_failing_is_one_line_and_the_next_start_goes_on(
    store: Store, tmp_path: Path, kind: str, words: str
) -> None:
    store.proxy.fault = lambda _, path: kind if "000003.tar" in path else ""
    with pytest.raises(StoreError, match=r"s3://photos/set/train/photos-000003\.tar: .*AWS_ACCESS_KEY_ID") as caught:
        copied(store.url, tmp_path, 0.5)
    assert words in one_line(caught)
    there = {path.name for path in tmp_path.rglob("photos-*.tar")}
    store.proxy.fault, before = lambda *_: "", len(shard_requests(store))
    assert sums(copied(store.url, tmp_path, 20)) == sums(store.local)
    assert not [request for request in shard_requests(store)[before:] if "/train/" in request and request[-17:] in there]


def test_a_kill_while_copying_leaves_no_half_shard(store: Store, tmp_path: Path) -> None:
    expected = sums(store.local)
    store.proxy.bytes_per_s = sum(path.stat().st_size for path in store.local.rglob("*.tar")) / 2
    process = subprocess.Popen([sys.executable, "-c", COPY, store.url, str(tmp_path)], cwd=ROOT)
    while not list(tmp_path.rglob("*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (unfinished,) = tmp_path.glob(".set-*.partial")
    whole = {name: digest for name, digest in sums(unfinished).items() if not Path(name).name.startswith(".")}
    assert whole.items() <= expected.items()
    store.proxy.bytes_per_s = float("inf")
    assert {name: digest for name, digest in sums(copied(store.url, tmp_path, 20)).items() if "/." not in name} == expected


def test_a_shard_that_is_not_of_its_manifest_or_index_is_refused(store: Store, tmp_path: Path) -> None:
    content = (store.local / "train" / "photos-000000.tar").read_bytes()
    url = store.upload("changed", shard1=content)
    with pytest.raises(StoreError, match=r"photos-000001\.tar: its sha256 is not that of manifest\.json") as caught:
        copied(url, tmp_path, 0.3)
    one_line(caught)
    for number, (changed, words) in enumerate(((content, "where the index has a sample"), (content[:5000], "truncated"))):
        url = store.upload(f"foreign{number}", shard1=changed, manifest=None)
        with pytest.raises(ValueError, match=rf"photos-000001\.tar: .*{words}") as caught:
            copied(url, tmp_path / str(number), 20)
        one_line(caught)
        store.upload(f"foreign{number}", manifest=None)
        assert len(open_index(copied(url, tmp_path / str(number), 20) / "train")) == sum(COUNTS)


def test_a_missing_shard_is_one_line(store: Store, tmp_path: Path) -> None:
    url = store.upload("short", shard1=None)
    with pytest.raises(FileNotFoundError, match=rf"^{url}/train/photos-000001\.tar: no such object") as caught:
        copied(url, tmp_path, 20)
    one_line(caught)


@pytest.mark.parametrize(("content", "words"), [(b"{", "no JSON"), (b'{"classes": [], "shards": [1]}', r"shards\.0 is 1")])
def test_a_damaged_manifest_is_one_line(store: Store, tmp_path: Path, content: bytes, words: str) -> None:
    url = store.upload(f"unnamed{len(content)}", manifest=content)
    with pytest.raises(ValueError, match=rf"manifest.json: damaged.*{words}") as caught:
        copied(url, tmp_path, 20)
    one_line(caught)


def test_a_damaged_index_is_one_line(store: Store, tmp_path: Path) -> None:
    for part, name in (("index", INDEX_NAME), ("samples", SAMPLES_NAME)):
        content = (store.local / "train" / name).read_bytes()
        url = store.upload(f"cut-{part}", **{part: content[:-100]})
        with pytest.raises(ValueError, match=rf"{name}: damaged.* Upload {url}/train/ again$"):
            copied(url, tmp_path, 20)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://photos/nothing", "no index.json here.* tools/make_shards.py index FOLDER"),
        ("s3://elsewhere/set", "no index.json here.* AWS_ENDPOINT_URL"),
        ("s3://", "write s3://BUCKET/PREFIX"),
    ],
    ids=["prefix", "bucket", "name"],
)
def test_a_missing_prefix_is_one_line(store: Store, tmp_path: Path, place: str, words: str) -> None:
    with pytest.raises((OSError, ValueError), match=words) as caught:
        copied(place, tmp_path, 20)
    one_line(caught)


def test_a_disk_without_room_is_one_line(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    before = len(shard_requests(store))
    with pytest.raises(OSError, match=r"0\.0 GB of shards, and the disk of .* has 0\.0 GB free\. Choose another"):
        copied(store.url, tmp_path, 20)
    assert len(shard_requests(store)) == before


def test_a_web_server_serves_shards_as_well(store: Store, tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(store.local))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert sums(copied(url, tmp_path, 20)) == sums(store.local)
        with pytest.raises(FileNotFoundError, match=INDEX_NAME):
            copied(f"{url}/nothing", tmp_path, 20)
        server.shutdown()


def test_an_index_names_no_file_outside_the_copy(store: Store, tmp_path: Path) -> None:
    from pipeline.shards.index_file import index_files

    index = open_index(store.local / "train")
    names = {f"../{name}": int(count) for name, count in zip(index.shards, index.counts, strict=True)}
    files = index_files(names, np.array(index.samples))
    url = store.upload("outside", index=files[INDEX_NAME], samples=files[SAMPLES_NAME])
    with pytest.raises(ValueError, match="is not the name of a file"):
        copied(url, tmp_path, 20)


def test_a_missing_client_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from pathlib import Path\n"
        "from pipeline.shards.copied import copied\n"
        "try: copied('gs://bucket/set', Path('nowhere'))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert "pip install -e '.[gs]'" in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1
