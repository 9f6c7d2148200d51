"""The cache of shards from a store: complete, bounded, shared, and sound after any failure."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pipeline.shards.cache import CacheFullError, CacheSettings, ShardCache, StoredShard
from pipeline.shards.fetcher import Cancelled
from pipeline.shards.index import ShardIndex, open_index
from pipeline.shards.storage import StoreError
from tests.pipeline.shards.conftest import COUNTS, Store
from tests.pipeline.shards.proxy import no_fault

ROOT = Path(__file__).parents[3]
RETRY_S = 20.0


def opened(store: Store, cache: Path, shards: float = 100, retry_s: float = RETRY_S, url: str | None = None) -> ShardIndex:
    """Open the training split with a cache that holds `shards` of its largest shards."""
    index = open_index(f"{url or store.url}/train")
    largest = max(shard.num_bytes for shard in index.remote.stored)
    return index.cached(CacheSettings(cache, int(shards * largest), retry_s))


def contents(index: ShardIndex) -> dict[str, bytes]:
    """Return the content of each cached shard, by its name in the data set."""
    folder, names = index.remote.cache.folder, {shard.name: shard.url for shard in index.remote.stored}
    return {names[path.name].rpartition("/")[2]: path.read_bytes() for path in folder.glob("*.tar")}


def assert_sound(store: Store, index: ShardIndex) -> None:
    """Check that every shard in the cache is complete."""
    for name, content in contents(index).items():
        assert content == (store.local / "train" / name).read_bytes()


def shard_requests(store: Store) -> list[str]:
    return [request for request in store.proxy.requests if ".tar" in request]


def test_each_shard_is_one_request_however_many_ask(store: Store, tmp_path: Path) -> None:
    indices = [opened(store, tmp_path) for _ in range(4)]
    before = len(shard_requests(store))
    fetchers = [index.fetcher() for index in indices]
    threads = [threading.Thread(target=fetcher.wait_for, args=(range(len(COUNTS)),)) for fetcher in fetchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shard_requests(store)) - before == len(COUNTS)
    assert len(contents(indices[0])) == len(COUNTS)
    assert_sound(store, indices[0])


def test_the_size_is_bounded_and_the_least_recently_planned_goes_first(store: Store, tmp_path: Path) -> None:
    index = opened(store, tmp_path, shards=2.1)
    cache, shards = index.remote.cache, index.remote.stored
    cache.make()
    for shard in (0, 1):
        cache.fetch(shards[shard], cache.new_pins())
        time.sleep(0.02)
    assert cache.pin(shards[0], cache.new_pins())  # planned once more
    time.sleep(0.02)
    cache.fetch(shards[3], cache.new_pins())
    there = {cache.path(shards[shard]).exists(): shard for shard in (0, 1)}
    assert there == {True: 0, False: 1}
    assert sum(map(len, contents(index).values())) <= cache.max_bytes


def test_a_shard_in_use_is_not_removed(store: Store, tmp_path: Path) -> None:
    index = opened(store, tmp_path, shards=2.1)
    cache, shards = index.remote.cache, index.remote.stored
    cache.make()
    pins = [cache.new_pins(), cache.new_pins()]
    for shard in (0, 1):
        cache.fetch(shards[shard], pins[shard])
    with pytest.raises(CacheFullError, match=r"no room for .* shards in use take .* of data.cache_size_gb"):
        cache.fetch(shards[3], cache.new_pins())
    assert all(cache.path(shards[shard]).exists() for shard in (0, 1))
    del pins[0]
    cache.fetch(shards[3], cache.new_pins())
    assert not cache.path(shards[0]).exists()
    assert cache.path(shards[1]).exists()
    assert_sound(store, index)


def test_a_pinned_shard_outlives_its_name_and_is_gone_with_its_pins(store: Store, tmp_path: Path) -> None:
    index = opened(store, tmp_path)
    pins = index.fetcher().wait_for([1])
    index.shard_path(1).unlink()  # a user who clears the cache
    link = pins.folder / index.shard_path(1).name
    assert link.read_bytes() == (store.local / "train" / index.shards[1]).read_bytes()
    del pins
    assert not link.parent.exists()


def test_the_pins_of_a_killed_process_are_removed(store: Store, tmp_path: Path) -> None:
    index = opened(store, tmp_path, shards=2.1)
    code = FETCH_ALL.replace("index.fetcher().wait_for(range(len(index.shards)))", HOLD_TWO)
    arguments = [sys.executable, "-c", code, f"{store.url}/train", str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "pinned\n"]
    cache, shards = index.remote.cache, index.remote.stored
    with pytest.raises(CacheFullError):
        cache.fetch(shards[3], cache.new_pins())
    process.kill()
    process.wait()
    assert list((tmp_path / "pins").iterdir())
    cache.fetch(shards[3], cache.new_pins())
    assert list((tmp_path / "pins").iterdir()) == []
    assert_sound(store, index)


@pytest.mark.parametrize("kind", ["503", "500", "cut"])
def test_every_third_request_fails_and_nothing_is_lost(store: Store, tmp_path: Path, kind: str) -> None:
    store.proxy.fault = lambda number, _: kind if number % 3 == 0 else ""
    index = opened(store, tmp_path)
    index.fetcher().wait_for(range(len(COUNTS)))
    assert len(contents(index)) == len(COUNTS)
    assert_sound(store, index)


@pytest.mark.parametrize(("kind", "words"), [("503", "SlowDown"), ("403", "ExpiredToken"), ("cut", "")])
def test_a_store_that_keeps_failing_is_one_line(store: Store, tmp_path: Path, kind: str, words: str) -> None:
    index = opened(store, tmp_path, retry_s=0.6)
    before = len(shard_requests(store))
    store.proxy.fault = lambda _, path: kind if ".tar" in path else ""
    with pytest.raises(StoreError) as caught:
        index.fetcher().wait_for([1])
    line = str(caught.value)
    assert line.startswith(index.shard_place(1))
    assert words in line
    assert "AWS_ACCESS_KEY_ID" in line
    assert "\n" not in line
    assert 2 <= len(shard_requests(store)) - before <= 4  # with pauses that grow
    assert sorted(os.listdir(tmp_path)) == ["locks", "pins"]
    store.proxy.fault = lambda *_: ""
    index.fetcher().wait_for([1])  # it comes back
    assert_sound(store, index)


def test_all_that_wait_for_a_shard_learn_that_it_fails(store: Store, tmp_path: Path) -> None:
    """A loader waits for its next shard at the same time as the prefetched window."""
    fetcher = opened(store, tmp_path, retry_s=0.5).fetcher()
    store.proxy.fault = lambda _, path: "503" if ".tar" in path else ""
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(fetcher.wait_for, [1, shard]) for shard in (0, 2, 3, 4)]
        done, _ = wait(waiting, timeout=20)
        assert len(done) == 4
        assert all(isinstance(future.exception(), StoreError) for future in done)


def test_waiting_ends_on_request(store: Store, tmp_path: Path) -> None:
    fetcher = opened(store, tmp_path).fetcher()
    store.proxy.fault = lambda _, path: "503" if ".tar" in path else ""
    started = time.monotonic()
    with pytest.raises(Cancelled):
        fetcher.wait_for([1], lambda: True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetcher.wait_for, [1])
        time.sleep(0.3)
        fetcher.release()
        assert isinstance(waiting.exception(RETRY_S / 2), Cancelled)
    assert time.monotonic() - started < RETRY_S / 2
    store.proxy.fault = no_fault
    fetcher.wait_for([1])


def test_a_changed_shard_is_refused(store: Store, tmp_path: Path) -> None:
    content = bytearray((store.local / "train" / "photos-000001.tar").read_bytes())
    content[700] ^= 1
    index = opened(store, tmp_path, url=store.upload("changed", shard1=bytes(content)))
    fetcher = index.fetcher()
    with pytest.raises(StoreError, match=r"photos-000001.tar: its sha256 is not that of manifest.json"):
        fetcher.wait_for([0, 1])
    assert list(contents(index)) == ["photos-000000.tar"]


def test_without_a_manifest_a_foreign_shard_is_refused(store: Store, tmp_path: Path) -> None:
    content = (store.local / "train" / "photos-000001.tar").read_bytes()
    url = store.upload("foreign", manifest=None, shard1=bytes(len(content)))
    fetcher = opened(store, tmp_path, url=url).fetcher()
    fetcher.wait_for([0])
    with pytest.raises(StoreError, match=r"photos-000001.tar: zero-filled"):
        fetcher.wait_for([1])


FETCH_ALL = """
import sys
from pathlib import Path
from pipeline.shards.cache import CacheSettings
from pipeline.shards.index import open_index
index = open_index(sys.argv[1]).cached(CacheSettings(Path(sys.argv[2]), 10**9, 20))
print("ready", flush=True)
index.fetcher().wait_for(range(len(index.shards)))
"""


HOLD_TWO = """
pins = index.fetcher().wait_for([0, 1])
print("pinned", flush=True)
sys.stdin.read()
"""


def killed_while_fetching(store: Store, cache: Path, seed: int) -> None:
    """Kill processes at random moments; the cache holds only complete shards each time, and the last one finishes."""
    rng, arguments = np.random.default_rng(seed), [sys.executable, "-c", FETCH_ALL, f"{store.url}/train", str(cache)]
    index = opened(store, cache)
    total = sum(shard.num_bytes for shard in index.remote.stored)
    store.proxy.bytes_per_s = total / 1.5
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(rng.uniform(0.05, 1.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_sound(store, index)
    store.proxy.bytes_per_s = float("inf")
    index.fetcher().wait_for(range(len(COUNTS)))
    assert len(contents(index)) == len(COUNTS)
    assert_sound(store, index)
    assert list(cache.glob("pins/*/*.partial")) == []


def test_a_kill_while_fetching_leaves_no_half_shard(store: Store, tmp_path: Path) -> None:
    killed_while_fetching(store, tmp_path, seed=0)


READ_ON = """
import hashlib, json, sys
from pathlib import Path
from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.shards.cache import CacheSettings
place, cache, done = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
dataset = build_multicrop_dataset("custom", place, global_crop_size=32, local_crop_size=16)
dataset = dataset.cached(CacheSettings(cache, int(sys.argv[4]), 20))
loader = build_multicrop_dataloader(dataset, 8, device="cpu", num_workers=1)
lines = done.read_text().splitlines() if done.exists() else []
if lines:
    loader.load_state_dict(json.loads(lines[-1])["state"])
print("ready", flush=True)
while loader.state_dict()["epoch"] < 12:
    for batch in loader:
        crops = hashlib.sha256(b"".join(crop.numpy().tobytes() for crop in batch.crops)).hexdigest()
        line = {"positions": batch.positions.tolist(), "crops": crops, "state": loader.state_dict()}
        with done.open("a") as file:
            file.write(json.dumps(line) + "\\n")
"""


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_reader_that_is_killed_twenty_times_has_the_crops_of_one_that_never_was(store: Store, tmp_path: Path) -> None:
    """From a cache with little room and over a slow connection, so that most kills come while it waits or fetches."""
    sizes = [path.stat().st_size for path in (store.local / "train").glob("*.tar")]
    found = {}
    for name, place, kills in (("local", store.local, 0), ("store", store.url, 20)):
        done = tmp_path / f"{name}.jsonl"
        arguments = [sys.executable, "-c", READ_ON, str(place), str(tmp_path), str(done), str(4 * max(sizes))]
        rng, store.proxy.bytes_per_s = np.random.default_rng(0), sum(sizes) / 6
        for count in rng.integers(0, 6, kills).tolist():
            process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            before = num_lines(done)
            while num_lines(done) < before + count:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.0))
            process.kill()
            assert process.wait() == -signal.SIGKILL, "it was over before the last kill"
        store.proxy.bytes_per_s = float("inf")
        subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        found[name] = [json.loads(line) for line in done.read_text().splitlines()]
    assert found["store"] == found["local"]
    positions = [position for line in found["store"] for position in line["positions"]]
    assert sorted(positions) == sorted(12 * list(range(sum(COUNTS))))


@pytest.mark.slow
def test_twenty_kills_while_fetching(store: Store, tmp_path: Path) -> None:
    for seed in range(20):
        killed_while_fetching(store, tmp_path / str(seed), seed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two shards and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Leave no room on its disk."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_makes_room_or_is_one_line(store: Store, small_disk: Path) -> None:
    index = opened(store, small_disk)
    cache, shards = index.remote.cache, index.remote.stored
    cache.make()
    for shard in shards:  # more than fits, one after the other
        cache.fetch(shard, cache.new_pins())
    assert_sound(store, index)
    for path in small_disk.glob("*.tar"):
        path.unlink()
    fill(small_disk / "other.bin")
    with pytest.raises(CacheFullError, match=r"the disk of data.cache_dir .* has .* MB free"):
        cache.fetch(shards[0], cache.new_pins())
    assert sorted(path.name for path in small_disk.iterdir()) == ["locks", "other.bin", "pins"]  # what is not ours stays


def test_a_new_upload_is_another_shard_of_the_cache(store: Store, tmp_path: Path) -> None:
    """By the manifest's sha256: an old copy is never taken for the new shard."""
    content = bytearray((store.local / "train" / "photos-000001.tar").read_bytes())
    content[700] ^= 1
    manifest = json.loads((store.local / "train" / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = hashlib.sha256(content).hexdigest()
    url = store.upload("again", shard1=bytes(content), manifest=json.dumps(manifest).encode())
    old, new = opened(store, tmp_path), opened(store, tmp_path, url=url)
    old.fetcher().wait_for([0, 1])
    before = len(shard_requests(store))
    new.fetcher().wait_for([0, 1])
    assert len(shard_requests(store)) - before == 1
    assert new.shard_path(1).read_bytes() == content
    assert old.shard_path(1).read_bytes() != content


def test_a_cache_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data.cache_dir: .* choose another$"):
        ShardCache(CacheSettings(tmp_path / "file" / "cache")).make()


def test_a_damaged_size_is_not_used(tmp_path: Path) -> None:
    cache = ShardCache(CacheSettings(tmp_path))
    cache.make()
    shard = StoredShard("s3://b/a.tar", "a-1.tar", 10, "f" * 64, np.zeros(2))
    (tmp_path / "a-1.tar").write_bytes(bytes(9))
    assert not cache.pin(shard, cache.new_pins())
    (tmp_path / "a-1.tar").write_bytes(bytes(10))
    assert cache.pin(shard, cache.new_pins())
