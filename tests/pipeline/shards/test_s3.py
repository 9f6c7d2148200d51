"""Shards on S3, read from moto's server, which runs as a process of its own on the loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.shards.index import INDEX_NAME, ShardIndex, open_index, save_index, split_folder
from tests.train.test_run import command
from train.run import main

pytest.importorskip("moto", reason="moto and flask come with the dev extra")
ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "quickstart.yaml"
SIZES = {"global_crop_size": 32, "local_crop_size": 16}


def request(endpoint: str, name: str, content: bytes = b"") -> None:
    headers = {"Content-Type": "application/octet-stream"}
    put = urllib.request.Request(f"{endpoint}/{name}", content, headers, method="PUT")
    with urllib.request.urlopen(put, timeout=30) as answer:
        assert answer.status == 200


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server with the bucket `photos`, and the settings for DALI, which reads them once in the life of a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    settings |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        for _ in range(600):
            try:
                request(url, "photos")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def upload(endpoint: str, folder: Path, prefix: str, index: ShardIndex, **changed: bytes | None) -> str:
    """The folder's tars and index under `s3://photos/prefix`; `changed`: other contents of `shard0`, ..., None to omit."""
    save_index(folder, list(index.shards), index.samples)
    contents: dict[str, bytes | None] = {name: (folder / name).read_bytes() for name in (*index.shards, INDEX_NAME)}
    contents |= {index.shards[int(name.removeprefix("shard"))]: content for name, content in changed.items()}
    for name, content in contents.items():
        if content is not None:
            request(endpoint, f"photos/{prefix}/{name}", content)
    return f"s3://photos/{prefix}"


@pytest.fixture(scope="module")
def local(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/, each with its index."""
    folder = tmp_path_factory.mktemp("local")
    for split in ("train", "val"):
        (folder / split).mkdir()
        for tar in (data_path / split).glob("*.tar"):
            (folder / split / tar.name).write_bytes(tar.read_bytes())
    return folder


@pytest.fixture(scope="module")
def remote(endpoint: str, local: Path) -> str:
    """The same on S3."""
    for split in ("train", "val"):
        upload(endpoint, local / split, f"set/{split}", open_index(local / split))
    return "s3://photos/set"


def test_the_split_is_found_by_its_index(remote: str) -> None:
    assert split_folder("custom", remote, "train") == f"{remote}/train"
    assert split_folder("custom", f"{remote}/", "val") == f"{remote}/val"
    assert split_folder("custom", f"{remote}/train", "train") == f"{remote}/train"


def test_the_index_is_the_local_one(remote: str, local: Path) -> None:
    ours, theirs = open_index(f"{remote}/train"), open_index(local / "train")
    assert (ours.shards, ours.sizes().tolist()) == (theirs.shards, [41, 40, 22])
    np.testing.assert_array_equal(ours.samples, theirs.samples)
    assert ours.key(50) == theirs.key(50)
    assert ours.encoded(102) == theirs.encoded(102)
    assert ours.describe(0).startswith(f"{remote}/train/photos-000000.tar: 00000000.jpg at byte 512")


def test_an_epoch_has_the_crops_of_local_files_bit_for_bit_and_every_sample_once(remote: str, local: Path) -> None:
    loaders = [
        build_multicrop_dataloader(
            build_multicrop_dataset("custom", place, **SIZES), 16, device="cpu", num_workers=1, drop_last=False
        )
        for place in (remote, local)
    ]
    positions, rows = [], []
    for ours, theirs in zip(*loaders, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.crops, theirs.crops, strict=True))
        assert torch.equal(ours.labels, theirs.labels)
        positions += ours.positions.tolist()
        rows += loaders[0].sequence.plan.rows(0, int(ours.positions[0]), int(ours.positions[-1]) + 1).tolist()
    assert sorted(positions) == sorted(rows) == list(range(103))
    assert len(loaders[0].quarantine) == 0


def test_a_run_trains_from_s3(remote: str, tmp_path: Path) -> None:
    arguments = command(
        CONFIG,
        Path("replaced"),
        tmp_path,
        "training.max_steps=2",
        "evaluation.max_samples=16",
        f"data.data_path={remote}",
    )
    assert main(arguments) == 0
    assert (tmp_path / "quickstart" / "summary.json").exists()


def test_a_damaged_sample_on_s3_is_replaced_and_named(endpoint: str, local: Path, tmp_path: Path) -> None:
    index = open_index(local / "train")
    content = bytearray(index.shard_path(0).read_bytes())
    offset = int(index.samples["offset"][7])
    content[offset : offset + 400] = bytes(400)
    place = upload(endpoint, local / "train", "damaged/train", index, shard0=bytes(content))
    loader = build_multicrop_dataloader(
        build_multicrop_dataset("custom", place, **SIZES), 16, device="cpu", num_workers=1, quarantine=tmp_path / "bad"
    )
    assert len(list(loader)) == 6
    assert list(loader.quarantine.reasons) == [7]
    assert '"key": "00000007.jpg"' in (tmp_path / "bad").read_text()


def test_a_defective_object_is_one_line_that_names_it(endpoint: str, local: Path) -> None:
    index = open_index(local / "train")
    whole = index.shard_path(1).read_bytes()
    defects: dict[str, tuple[bytes | None, str]] = {
        "missing": (None, "cannot be read from S3 (no such bucket or key, or no permission to read it)"),
        "short": (whole[: len(whole.rstrip(b"\0")) - 2000], "the object ends before"),
        "half": (whole[: len(whole) // 2], "the object ends before"),
        "zeros": (bytes(len(whole)), "zero-filled"),
        "other": (index.shard_path(0).read_bytes(), "of another data set"),
    }
    for name, (content, words) in defects.items():
        place = upload(endpoint, local / "train", name, index, shard1=content)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_index(place)
        assert str(caught.value).startswith(f"{place}/photos-000001.tar: {words}")
        assert "\n" not in str(caught.value)


def test_a_damaged_index_is_one_line(endpoint: str, local: Path) -> None:
    content = (local / "train" / INDEX_NAME).read_bytes()
    request(endpoint, f"photos/cut/{INDEX_NAME}", content[:-100])
    with pytest.raises(ValueError, match=r"^s3://photos/cut/index.npz: damaged, or not an index .* Upload it again$"):
        open_index("s3://photos/cut")


@pytest.mark.parametrize(
    ("place", "settings", "words"),
    [
        ("s3://photos/nothing", {}, "no such bucket or key, or no permission to read it"),
        ("s3://elsewhere/set", {}, "no such bucket or key, or no permission to read it"),
        (
            "s3://photos/set",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "AWS_SECRET_ACCESS_KEY (are not set",
        ),
        ("s3://photos/set", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect to server"),
        ("s3://", {}, "write s3://BUCKET/PREFIX"),
    ],
    ids=["prefix", "bucket", "credentials", "endpoint", "name"],
)
def test_the_command_says_what_to_set(remote: str, place: str, settings: dict[str, str], words: str) -> None:
    arguments = command(CONFIG, Path("replaced"), Path("runs"), f"data.data_path={place}")
    environment = {**os.environ, **settings}
    done = subprocess.run(
        [sys.executable, "-m", "train.run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line
    assert place == "s3://" or all(name in line for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", INDEX_NAME))
