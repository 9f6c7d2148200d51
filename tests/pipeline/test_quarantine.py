"""Damaged samples at run time: named, replaced, remembered, and nothing else moves."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.crops.device import DeviceError, as_device_error, decode_error, find_faults
from pipeline.loader import MultiCropLoader
from pipeline.quarantine import Quarantine, allowed_bad
from pipeline.shards.index import SAMPLE_DTYPE, ShardIndex, open_index, save_index
from tests.conftest import photographs
from tests.train.test_run import ROOT, command
from train.run import main

BATCH, COUNT = 8, 320
CONFIG = ROOT / "configs" / "quickstart.yaml"


def png(content: bytes) -> bytes:
    image = io.BytesIO()
    Image.open(io.BytesIO(content)).save(image, "PNG")
    return image.getvalue()


def segment(content: bytes, marker: int) -> int:
    """Where the JPEG segment with this marker begins."""
    return content.index(bytes([0xFF, marker]))


def gif(content: bytes) -> bytes:
    image = io.BytesIO()
    Image.open(io.BytesIO(content)).resize((16, 16)).save(image, "GIF")
    return image.getvalue()


DEFECTS: dict[str, Callable[[bytes], bytes]] = {
    "no bytes": lambda content: b"",
    "one byte": lambda content: content[:1],
    "the signature alone": lambda content: content[:3],
    "cut in the header": lambda content: content[:200],
    "cut in half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "zeros after the header": lambda content: content[: segment(content, 0xDB)] + bytes(2000),
    "noise": lambda content: np.random.default_rng(0).bytes(len(content)),
    "text": lambda content: b"404 Not Found\n" * 40,
    "a web page": lambda content: b"<!DOCTYPE html><html><body>Forbidden</body></html>" * 9,
    "a GIF": gif,
    "no quantisation tables": lambda content: content.replace(b"\xff\xdb", b"\xff\xee"),
    "no frame header": lambda content: content.replace(b"\xff\xc0", b"\xff\xee"),
    "no scan": lambda content: content[: segment(content, 0xDA)] + b"\xff\xd9",
    "a PNG cut in half": lambda content: png(content)[: len(png(content)) // 2],
    "a PNG without its end": lambda content: png(content)[:-400],
    "a PNG of noise": lambda content: png(content)[:60] + np.random.default_rng(1).bytes(400),
}


def write_raw(folder: Path, contents: list[bytes], sizes: list[tuple[int, int]]) -> ShardIndex:
    """A shard and an index of any bytes, damaged ones too: `(width, height)` are what they were before the damage."""
    import tarfile

    folder.mkdir(parents=True)
    rows = []
    with tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (content, (width, height)) in enumerate(zip(contents, sizes, strict=True)):
            info = tarfile.TarInfo(f"{i:06d}.jpg")
            info.size = len(content)
            rows.append((0, tar.offset + tarfile.BLOCKSIZE, len(content), i % 5, height, width))
            tar.addfile(info, io.BytesIO(content))
    save_index(folder, ["000000.tar"], np.array(rows, SAMPLE_DTYPE))
    return open_index(folder)


@pytest.fixture(scope="module")
def pictures() -> tuple[list[bytes], list[tuple[int, int]]]:
    contents, sizes = [], []
    for picture in photographs(COUNT):
        image = io.BytesIO()
        picture.save(image, "JPEG")
        contents.append(image.getvalue())
        sizes.append(picture.size)
    return contents, sizes


@pytest.fixture(scope="module")
def damaged(
    tmp_path_factory: pytest.TempPathFactory, pictures: tuple[list[bytes], list[tuple[int, int]]]
) -> tuple[Path, list[int]]:
    """5 % of the samples, one of each kind of defect; returns the data path and their rows."""
    contents, sizes = pictures
    rows = np.random.default_rng(3).permutation(COUNT)[: len(DEFECTS)].tolist()
    broken = list(contents)
    for row, defect in zip(rows, DEFECTS.values(), strict=True):
        broken[row] = defect(contents[row])
    data_path = tmp_path_factory.mktemp("damaged")
    write_raw(data_path / "train", broken, sizes)
    return data_path, sorted(rows)


def loader_of(data_path: Path, quarantine: Path | None = None, **options: object) -> MultiCropLoader:
    dataset = build_multicrop_dataset("custom", data_path, num_local_crops=1, global_crop_size=32, local_crop_size=16)
    defaults = {"batch_size": BATCH, "device": "cpu", "num_workers": 1, "max_bad_share": 0.1, "normalized": False}
    return build_multicrop_dataloader(dataset, quarantine=quarantine, **{**defaults, **options})


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_one(tmp_path: Path, pictures: tuple[list[bytes], list[tuple[int, int]]], defect: str) -> None:
    contents, sizes = pictures
    index = write_raw(tmp_path / "train", [contents[0], DEFECTS[defect](contents[1])], sizes[:2])
    faults = find_faults(index, [0, 1], "cpu")
    assert list(faults) == [1]
    assert faults[1]
    assert "\n" not in faults[1]
    assert "0x" not in faults[1]


def test_an_epoch_names_every_damaged_sample_and_sees_every_good_one(
    damaged: tuple[Path, list[int]], pictures: tuple[list[bytes], list[tuple[int, int]]], tmp_path: Path
) -> None:
    data_path, bad = damaged
    path = tmp_path / "quarantine.jsonl"
    loader = loader_of(data_path, path)
    batches = list(loader)
    index = loader.index
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(entry["offset"] for entry in entries) == index.samples["offset"][bad].tolist()
    assert {entry["key"] for entry in entries} == {f"{row:06d}.jpg" for row in bad}
    assert {entry["shard"] for entry in entries} == {"000000.tar"}
    assert len(loader.quarantine) == len(bad)
    # The good samples stand where they would without the damage, with the same crops.
    write_raw(tmp_path / "whole" / "train", *pictures)
    planned = loader.sequence.plan.rows(0, 0, COUNT)
    good = torch.from_numpy(~np.isin(planned, bad))
    for v in range(3):
        crops = torch.cat([batch.crops[v] for batch in batches])
        whole = torch.cat([batch.crops[v] for batch in loader_of(tmp_path / "whole")])
        assert torch.equal(crops[good], whole[good])
        assert not torch.equal(crops[~good], whole[~good])
    # Every position is there, and no replacement is a damaged sample.
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(COUNT))
    labels = torch.cat([batch.labels for batch in batches])
    np.testing.assert_array_equal(labels[good], index.samples["label"][planned][good])


READ_ALL = """
import sys
from tests.pipeline.test_quarantine import loader_of

loader = loader_of(sys.argv[1], batch_size=64)
assert sum(len(batch.labels) for batch in loader) == len(loader.index)
assert len(loader.quarantine) == 16
"""


def test_broken_headers_in_a_large_batch_do_not_end_the_process(
    tmp_path: Path, pictures: tuple[list[bytes], list[tuple[int, int]]]
) -> None:
    """DALI parses a large batch in several threads; see `parsed` in pipeline/crops/graph.py."""
    contents, sizes = pictures
    broken = [content[:40] + bytes(2000) if row % 20 == 0 else content for row, content in enumerate(contents)]
    write_raw(tmp_path / "train", broken, sizes)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_crops_do_not_depend_on_when_the_damage_was_found(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    data_path, bad = damaged
    first = list(loader_of(data_path, tmp_path / "a.jsonl"))
    known = list(loader_of(data_path, tmp_path / "a.jsonl"))  # the file is read: nothing is found again
    alone = loader_of(data_path)
    alone.load_state_dict({"epoch": 0, "position": 15 * BATCH})
    late = list(alone)  # its first damage is that of the middle of the epoch
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == len(bad)
    for v in range(3):
        for i in range(len(first)):
            assert torch.equal(first[i].crops[v], known[i].crops[v])
            if i >= 15:
                assert torch.equal(first[i].crops[v], late[i - 15].crops[v])


def test_the_next_epoch_remembers(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    loader = loader_of(damaged[0], tmp_path / "q.jsonl")
    list(loader)
    written = (tmp_path / "q.jsonl").read_text()
    list(loader)
    assert (tmp_path / "q.jsonl").read_text() == written


def test_two_ranks_name_a_sample_once(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    loaders = [loader_of(damaged[0], path, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        for loader in loaders:
            list(loader)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(damaged[1])


def test_more_than_the_allowed_share_stops_with_the_list(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    with pytest.raises(ValueError, match=r"more than the 5 that data.max_bad_share 0.01 allows") as caught:
        list(loader_of(damaged[0], path, max_bad_share=0.01))
    assert "000000.tar: 0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(path.read_text().splitlines()) > 3


def add_broken_shard(folder: Path, count: int) -> None:
    """A second tar, a copy of the first whose first `count` images are zeros; the index lists no other ones of it."""
    whole = open_index(folder)
    shutil.copy(folder / "000000.tar", folder / "000001.tar")
    second = whole.samples.copy()[:count]
    second["shard"] = 1
    save_index(folder, ["000000.tar", "000001.tar"], np.concatenate([whole.samples, second]))
    with (folder / "000001.tar").open("r+b") as file:
        for row in second:
            file.seek(int(row["offset"]))
            file.write(bytes(int(row["size"])))


def test_a_shard_of_nothing_but_damage_is_survived(tmp_path: Path, pictures: tuple[list[bytes], list[tuple[int, int]]]) -> None:
    write_raw(tmp_path / "train", *pictures)
    add_broken_shard(tmp_path / "train", 40)
    loader = loader_of(tmp_path, max_bad_share=0.2)
    batches = list(loader)
    assert len(batches) == (COUNT + 40) // BATCH
    assert set(loader.quarantine.reasons.values()) == {"filled with zeros"}
    assert len(loader.quarantine) >= 40 - (COUNT + 40) % BATCH


def test_training_on_all_this_damage_completes_with_the_exact_list(
    damaged: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5 % of the samples with one defect each, and a shard of which nothing is left."""
    data_path, bad = damaged
    shutil.copytree(data_path / "train", tmp_path / "data" / "train")
    add_broken_shard(tmp_path / "data" / "train", 40)
    settings = ("data.max_bad_share=0.2", "training.epochs=1", "evaluation.eval_frequency=0")
    assert main(command(CONFIG, tmp_path / "data", tmp_path, *settings)) == 0
    run = tmp_path / "quickstart"
    entries = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    found = [(entry["shard"], entry["key"]) for entry in entries]
    assert sorted(found) == sorted(
        [("000000.tar", f"{row:06d}.jpg") for row in bad] + [("000001.tar", f"{row:06d}.jpg") for row in range(40)]
    )
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["bad_samples"] for line in lines if "bad_samples" in line][-1] == len(bad) + 40
    assert f"{len(bad) + 40} bad samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("total", "share", "allowed"), [(9, 0.01, 0), (24, 0.01, 2), (60, 0.01, 5), (1000, 0.01, 10), (24, 0.5, 12), (24, 0.0, 0)]
)
def test_a_small_set_may_have_a_few_bad_samples(total: int, share: float, allowed: int) -> None:
    assert allowed_bad(total, share) == allowed


def test_training_goes_on_with_the_few_bad_samples_that_a_conversion_lets_pass(index: ShardIndex) -> None:
    quarantine = Quarantine(index)
    quarantine.add(dict.fromkeys(range(5), "empty file"))  # of 103; a hundredth is one
    with pytest.raises(ValueError, match="6 samples cannot be decoded, more than the 5"):
        quarantine.add({5: "empty file"})


def test_the_folder_of_the_file_can_be_made_after_the_quarantine(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "run" / "q.jsonl"
    quarantine = Quarantine(index, path)
    path.parent.mkdir()
    quarantine.add({5: "empty file"})
    assert Quarantine(index, path).reasons == {5: "empty file"}


def test_lines_about_a_data_set_whose_tars_have_the_same_names_are_passed_over(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    Quarantine(index, path).add({5: "empty file"})
    assert Quarantine(index, path).reasons == {5: "empty file"}
    samples = index.samples.copy()
    samples["label"][0] += 1
    assert Quarantine(replace(index, samples=samples), path).reasons == {}


def test_lines_about_other_data_and_half_a_line_are_passed_over(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    entry = {"row": 5, "shard": index.shards[0], "key": "x", "reason": "empty file", "data": index.digest}
    other = {**entry, "row": 6, "data": "of another set"}
    path.write_text(json.dumps(other) + "\n" + json.dumps(entry) + "\n" + '{"shard": "pho')
    assert Quarantine(index, path).reasons == {5: "empty file"}


DEVICE_ERRORS = {
    "CUDA runtime API error cudaErrorInsufficientDriver (35):\nCUDA driver version is insufficient": DeviceError,
    "dlopen libcuda.so failed. Please install GPU driver.": DeviceError,
    "CUDA driver API error CUDA_ERROR_ILLEGAL_ADDRESS (700)": DeviceError,
    "nvml error (15): the GPU has fallen off the bus or has otherwise become inaccessible": DeviceError,
    "Can't allocate 1073741824 bytes on device 0.": torch.OutOfMemoryError,
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory": torch.OutOfMemoryError,
    "CUDA allocation failed": torch.OutOfMemoryError,
    "CUBLAS_STATUS_ALLOC_FAILED": torch.OutOfMemoryError,
}


@pytest.mark.parametrize("message", DEVICE_ERRORS)
def test_an_error_of_the_device_puts_no_sample_in_quarantine(data_path: Path, tmp_path: Path, message: str) -> None:
    loader = loader_of(data_path, tmp_path / "q.jsonl")
    with pytest.raises(DEVICE_ERRORS[message]) as caught:
        loader._set_aside(np.arange(4), f"Error in thread 0: encountered:\n{message}")
    assert "\n" not in str(caught.value)
    assert len(loader.quarantine) == 0
    assert not (tmp_path / "q.jsonl").exists()


def test_what_dali_says_of_damaged_images_is_no_error_of_a_device(pictures: tuple[list[bytes], list[tuple[int, int]]]) -> None:
    for defect in DEFECTS.values():
        message = decode_error(defect(pictures[0][1]), "cpu")
        assert message
        assert as_device_error(message, "cpu") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_its_decoder_is_one_error_and_no_images_are_named(index: ShardIndex) -> None:
    with pytest.raises(DeviceError, match="gpu") as caught:
        find_faults(index, range(4), "gpu")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_gpu_names_no_good_image(index: ShardIndex) -> None:
    assert find_faults(index, range(4), "gpu:0") == {}
