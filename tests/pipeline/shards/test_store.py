"""Training from a store: the crops of local files, bit for bit, and clear lines where it cannot be read."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.loader import MultiCropLoader
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import INDEX_NAME, open_index, split_folder
from pipeline.shards.index_file import SAMPLES_NAME
from pipeline.shards.storage import StoreError, is_remote, read_whole
from tests.pipeline.shards.conftest import COUNTS, Store
from tests.pipeline.shards.proxy import Fault, ThrottledProxy, environment, no_fault
from tests.train.test_run import command
from train.evaluation.features import check_classes, subsample_evenly
from train.run import main

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "quickstart.yaml"
SIZES = {"global_crop_size": 32, "local_crop_size": 16}
TOTAL = sum(COUNTS)


def loader(place: Path | str, cache: Path, batch: int = 16, max_bytes: int = 10**9, **options: object) -> MultiCropLoader:
    dataset = build_multicrop_dataset("custom", place, **SIZES).cached(CacheSettings(cache, max_bytes, 20))
    return build_multicrop_dataloader(dataset, batch, device="cpu", num_workers=1, **options)


def assert_equal(ours: MultiCropLoader, theirs: MultiCropLoader) -> list[int]:
    positions = []
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
        assert torch.equal(a.labels, b.labels)
        positions += a.positions.tolist()
    return positions


def test_the_schemes_are_told_from_paths() -> None:
    remote = ["s3://b/p", "gs://b/p", "az://c/p", "hf://datasets/u/r", "https://host/p"]
    assert [is_remote(place) for place in remote] == [True] * 5
    assert not any(is_remote(place) for place in ("s3:/b", "shards/mine", Path("s3://b/p"), "file://x"))


def test_the_split_is_found_and_its_index_is_the_local_one(store: Store) -> None:
    assert split_folder("custom", store.url, "train") == f"{store.url}/train"
    assert split_folder("custom", f"{store.url}/", "val") == f"{store.url}/val"
    assert split_folder("custom", f"{store.url}/train", "train") == f"{store.url}/train"
    ours, theirs = open_index(f"{store.url}/train"), open_index(store.local / "train")
    assert (ours.shards, ours.counts.tolist()) == (theirs.shards, COUNTS)
    np.testing.assert_array_equal(ours.samples, theirs.samples)
    assert ours.key(50) == theirs.key(50)
    assert ours.encoded(102) == theirs.encoded(102)
    assert ours.describe(0).startswith(f"{store.url}/train/photos-000000.tar: 00000000.jpg at byte 512")


def test_a_change_of_the_environment_reaches_the_next_request(store: Store) -> None:
    url = f"{store.url}/train/{INDEX_NAME}"
    content = read_whole(url, 1 << 30)
    with ThrottledProxy(store.server) as other:
        with environment(other.url):
            assert read_whole(url, 1 << 30) == content
        before = len(store.proxy.requests)
        assert read_whole(url, 1 << 30) == content
        assert len(other.requests) == len(store.proxy.requests) - before == 1


@pytest.mark.parametrize("room", [100.0, 4.0], ids=["all", "little"])
def test_two_epochs_have_the_crops_of_local_files_and_every_sample_once(store: Store, tmp_path: Path, room: float) -> None:
    largest = max(path.stat().st_size for path in (store.local / "train").glob("*.tar"))
    ours = loader(store.url, tmp_path, max_bytes=int(room * largest), drop_last=False)
    theirs = loader(store.local, tmp_path, drop_last=False)
    for _ in range(2):
        assert sorted(assert_equal(ours, theirs)) == list(range(TOTAL))
    assert len(ours.quarantine) == 0


def test_resumed_on_other_ranks_it_goes_on_where_it_stopped(store: Store, tmp_path: Path) -> None:
    first = loader(store.url, tmp_path, batch=16)
    batches = iter(first)
    seen = [position for _ in range(3) for position in next(batches).positions.tolist()]
    state = first.state_dict()
    for rank in range(2):
        ours, theirs = (loader(place, tmp_path, batch=8, rank=rank, world_size=2) for place in (store.url, store.local))
        ours.load_state_dict(state)
        theirs.load_state_dict(state)
        seen += assert_equal(ours, theirs)
    assert sorted(seen) == list(range(TOTAL // 16 * 16))


def test_it_starts_with_the_first_shard_and_fetches_the_next_ones_in_the_order_of_the_plan(store: Store, tmp_path: Path) -> None:
    ours = loader(store.url, tmp_path, batch=8)
    before = len(store.proxy.requests)
    next(iter(ours))
    assert len(set(np.unique(ours._window.shards))) == 1
    order = ours.sequence.plan.shards(0, 0).tolist()
    for _ in ours:
        pass
    fetched = [request for request in store.proxy.requests[before:] if ".tar" in request]
    assert fetched[0].endswith(f"{order[0]:06d}.tar")
    assert sorted(fetched) == sorted(f"GET /photos/set/train/photos-{shard:06d}.tar" for shard in order)
    assert ours.store_wait_s > 0


def test_a_store_that_fails_ends_the_run_with_a_checkpoint_from_which_it_continues(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "quickstart"
    arguments = command(
        CONFIG, Path("replaced"), tmp_path, "training.max_steps=18", "evaluation.max_samples=16", "data.batch_size=16",
        f"data.data_path={store.url}", f"data.cache_dir={cache}", "data.store_retry_s=0.5",
        "evaluation.linear_epochs=0", "evaluation.eval_frequency=1",
    )  # fmt: skip

    def saved_when_it_fails(fault: Fault) -> list[str]:
        """Return the checkpoints of a run whose credentials expire."""
        store.proxy.fault = fault
        assert main(arguments) == 2
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"{store.url}/")
        assert "ExpiredToken" in last
        step = re.search(r"; stopped at step (\d+); the same command continues from there$", last)
        assert step is not None
        saved = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert saved[-1] == f"step_{int(step[1]):08d}"
        return saved

    def in_the_evaluation(_: int, path: str) -> str:
        """The validation shard, here since the baselines, is gone when the epoch ends."""
        if (out / "baselines.json").exists() and "/train/photos" in path:
            (cache / validation).unlink(missing_ok=True)
        return "403" if "/val/photos" in path and (out / "baselines.json").exists() else ""

    def in_the_epoch(_: int, path: str) -> str:
        return "403" if "/train/photos" in path and num_fetched() > first + 3 else ""

    def num_fetched() -> int:
        return sum("/train/photos" in request for request in store.proxy.requests)

    validation = open_index(f"{store.url}/val").remote.stored[0].name
    assert saved_when_it_fails(in_the_evaluation) == ["step_00000010"]
    shutil.rmtree(cache)
    first = num_fetched()
    assert len(saved_when_it_fails(in_the_epoch)) == 2
    store.proxy.fault = no_fault
    assert main(arguments) == 0
    assert json.loads((out / "summary.json").read_text())["store_wait_percent"] > 0
    assert "of it for the store" in (out / "report.html").read_text()


def test_a_damaged_sample_is_replaced_and_named(store: Store, tmp_path: Path) -> None:
    index = open_index(store.local / "train")
    content = bytearray(index.shard_path(0).read_bytes())
    offset = int(index.samples["offset"][7])
    content[offset : offset + 400] = bytes(400)
    url = store.upload("damaged", shard0=bytes(content), manifest=None)
    ours = loader(url, tmp_path / "cache", quarantine=tmp_path / "bad")
    assert len(list(ours)) == TOTAL // 16
    assert list(ours.quarantine.reasons) == [7]
    assert '"key": "00000007.jpg"' in (tmp_path / "bad").read_text()


def test_a_missing_or_short_object_is_found_at_the_start(store: Store) -> None:
    content = (store.local / "train" / "photos-000001.tar").read_bytes()
    for changed, words in ((None, "missing"), (content[: len(content) // 2], "truncated"), (content + bytes(512), "changed")):
        url = store.upload("broken" + words, shard1=changed)
        with pytest.raises(ValueError, match=rf"^{url}/train/photos-000001.tar: .*{words}") as caught:
            open_index(f"{url}/train")
        assert "\n" not in str(caught.value)


def test_the_class_names_of_two_splits_in_a_store_are_compared(store: Store) -> None:
    indices = []
    for split, classes in (("named", ["ant", "bee"]), ("others", ["bee", "ant"])):
        manifest = json.loads((store.local / "train" / "manifest.json").read_text()) | {"classes": classes}
        indices.append(open_index(f"{store.upload(split, manifest=json.dumps(manifest).encode())}/train"))
    check_classes(indices[0], indices[0])
    with pytest.raises(ValueError, match=r"s3://photos/others/train: .* label 0 is 'ant' in train and 'bee' in val"):
        check_classes(*indices)


@pytest.mark.parametrize(("content", "words"), [(b"{", "no JSON"), (b'{"classes": [], "shards": [1]}', r"shards\.0 is 1")])
def test_a_damaged_manifest_is_one_line(store: Store, content: bytes, words: str) -> None:
    url = store.upload(f"unnamed{len(content)}", manifest=content)
    with pytest.raises(ValueError, match=rf"^{url}/train/manifest.json: damaged.*{words}") as caught:
        open_index(f"{url}/train")
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_one_line(store: Store) -> None:
    for part, name in (("index", INDEX_NAME), ("samples", SAMPLES_NAME)):
        content = (store.local / "train" / name).read_bytes()
        url = store.upload(f"cut-{part}", **{part: content[:-100]})
        with pytest.raises(ValueError, match=rf"^{url}/train/{name}: damaged.* Upload it again$"):
            open_index(f"{url}/train")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://photos/nothing", INDEX_NAME),
        ("s3://elsewhere/set", "no such .* AWS_ENDPOINT_URL"),
        ("s3://", "write s3://BUCKET/PREFIX"),
    ],
    ids=["prefix", "bucket", "name"],
)
def test_a_missing_prefix_is_one_line(store: Store, place: str, words: str) -> None:
    with pytest.raises((OSError, ValueError), match=words) as caught:
        split_folder("custom", place, "train")
    assert "\n" not in str(caught.value)


def test_expired_credentials_are_named(store: Store) -> None:
    store.proxy.fault = lambda *_: "403"
    with pytest.raises(StoreError, match=r"ExpiredToken.*AWS_ACCESS_KEY_ID"):
        read_whole(f"{store.url}/train/{INDEX_NAME}", 1 << 30, retry_s=0.3)


def test_a_web_server_serves_shards_as_well(store: Store, tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(store.local))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        ours, theirs = (loader(place, tmp_path) for place in (url, store.local))
        assert_equal(ours, theirs)
        with pytest.raises(FileNotFoundError, match=INDEX_NAME):
            split_folder("custom", f"{url}/nothing", "train")
        server.shutdown()


def test_an_evaluation_reads_few_complete_shards_of_a_store(store: Store) -> None:
    index = open_index(f"{store.url}/train")
    for most, shards in ((30, 1), (60, 2), (100, 3), (1000, 5)):
        some = subsample_evenly(index, most)
        assert len(some) == min(most, TOTAL)
        assert len(np.unique(some.samples["shard"])) == np.count_nonzero(some.counts) == shards


def test_a_missing_client_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from pipeline.shards.index import split_folder\n"
        "try: split_folder('custom', 'gs://bucket/set', 'train')\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert "pip install -e '.[gs]'" in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1
