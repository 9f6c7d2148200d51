"""A store on the loopback: moto's S3 server, and a proxy to it that counts requests and fails on request."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.shards.index import INDEX_NAME, ShardIndex, open_index, save_index
from pipeline.shards.index_file import SAMPLES_NAME
from tests.conftest import write_shards
from tests.pipeline.shards.proxy import ThrottledProxy, environment, moto_server, no_fault, put, put_folder

COUNTS = [41, 40, 22, 30, 35]


@dataclass
class Store:
    """`local`: a folder with train/ and val/; `url`: the same in the store; `server`: the store without the proxy."""

    local: Path
    url: str
    server: str
    proxy: ThrottledProxy

    def upload(self, prefix: str, **changed: bytes | None) -> str:
        """Upload the training split; `changed`: other contents of `shard0`, `index`, `samples` or `manifest`, None to omit."""
        folder = self.local / "train"
        index = open_index(folder)
        contents: dict[str, bytes | None] = {path.name: path.read_bytes() for path in folder.iterdir()}
        names = {f"shard{k}": name for k, name in enumerate(index.shards)}
        names |= {"index": INDEX_NAME, "samples": SAMPLES_NAME, "manifest": "manifest.json"}
        contents |= {names[key]: content for key, content in changed.items()}
        for name, content in contents.items():
            if content is not None:
                put(self.server, f"photos/{prefix}/train/{name}", content)
        return f"s3://photos/{prefix}"


def write_manifest(folder: Path, index: ShardIndex) -> None:
    contents = {name: (folder / name).read_bytes() for name in index.shards}
    entries = [
        {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in contents.items()
    ]
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "shards": entries}))


@pytest.fixture(scope="session")
def session_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    for package, extra in (("moto", "dev"), ("s3fs", "s3")):
        pytest.importorskip(package, reason=f"{package} is missing: it comes with the extra {extra}")
    local = tmp_path_factory.mktemp("store")
    for split, counts in (("train", COUNTS), ("val", [24])):
        folder = write_shards(local / split, counts)
        index = open_index(folder)
        save_index(folder, list(index.shards), index.samples)
        write_manifest(folder, index)
    with moto_server() as server, ThrottledProxy(server) as proxy, environment(proxy.url):
        for split in ("train", "val"):
            put_folder(server, local / split, f"set/{split}")
        yield Store(local, "s3://photos/set", server, proxy)


@pytest.fixture
def store(session_store: Store) -> Iterator[Store]:
    yield session_store
    session_store.proxy.fault, session_store.proxy.bytes_per_s = no_fault, float("inf")
