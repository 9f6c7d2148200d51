"""The file system of the shards decides how they are read."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.shards.storage import allow_open_files, file_system, join, resolve_use_mmap

MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:26 / /data rw,relatime shared:2 - nfs4 server:/export rw,vers=4.2
31 30 0:27 / /data/fast rw - xfs /dev/nvme0n1 rw
32 22 0:28 / /data\\040sets rw shared:3 master:1 - lustre 10.0.0.1@tcp:/scratch rw
33 22 0:29 / /bucket rw - fuse.s3fs s3fs rw
34 22 0:30 / /twice rw - nfs server:/old rw
35 34 0:31 / /twice rw - ext4 /dev/vdb rw
36 22 0:32 / /layers rw - fuse.fuse-overlayfs fuse-overlayfs rw
"""
KINDS = [
    ("/home/shards", "ext4", True),
    ("/data", "nfs4", False),
    ("/data/imagenet/train", "nfs4", False),
    ("/data/fast/train", "xfs", True),
    ("/database", "ext4", True),
    ("/data sets/train", "lustre", False),
    ("/bucket/x", "fuse.s3fs", False),
    ("/twice/x", "ext4", True),
    ("/layers/x", "fuse.fuse-overlayfs", True),
]


@pytest.mark.parametrize(("folder", "kind", "mapped"), KINDS)
def test_the_file_system_of_a_folder_decides(
    folder: str, kind: str, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr("pipeline.shards.storage.MOUNTS", mounts)
    assert file_system(folder) == kind
    assert resolve_use_mmap("auto", Path(folder)) is mapped
    assert resolve_use_mmap(True, folder) is True
    assert resolve_use_mmap(False, folder) is False


def test_links_are_followed_and_this_system_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_system("/proc/self") == "proc"
    (tmp_path / "link").symlink_to("/proc")
    assert file_system(tmp_path / "link") == "proc"
    monkeypatch.setattr("pipeline.shards.storage.MOUNTS", tmp_path / "absent")
    assert file_system(tmp_path) == ""
    assert resolve_use_mmap("auto", tmp_path) is True


def test_names_join_to_paths_and_urls() -> None:
    assert join(Path("/a/b"), "c.tar") == "/a/b/c.tar"
    assert join("a/b/", "c.tar") == "a/b/c.tar"
    assert join("s3://bucket/set/", "c.tar") == "s3://bucket/set/c.tar"
    assert join("s3://bucket", "c.tar") == "s3://bucket/c.tar"


def test_crops_are_the_same_with_and_without_mappings(data_path: Path) -> None:
    dataset = build_multicrop_dataset("custom", data_path, global_crop_size=32, local_crop_size=16)
    loaders = [
        build_multicrop_dataloader(dataset, 16, device="cpu", num_workers=1, use_mmap=use_mmap) for use_mmap in (True, False)
    ]
    for mapped, plain in zip(*loaders, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mapped.crops, plain.crops, strict=True))


def test_the_limit_of_open_files_is_raised_to_what_is_needed() -> None:
    code = (
        "import resource; from pipeline.shards.storage import allow_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4000))\n"
        "allow_open_files(1000); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "allow_open_files(10); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try: allow_open_files(5000)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, refused = done.stdout.splitlines()
    assert (first, second) == ("(1512, 4000)", "(1512, 4000)")
    assert "needs 5512 open files and this system allows 4000" in refused
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) >= before
