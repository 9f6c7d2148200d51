"""The doctor on a sound machine, and on one problem at a time, planted where it would really occur."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.shards.index import open_index, split_folder
from tools import doctor, make_shards
from tools.checks import machine
from tools.checks.check import Case, Finding, examine
from train.config.load import load_config

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def shards(data_path: Path, tmp_path: Path) -> Path:
    """Good shards with index and manifest, to be damaged."""
    assert make_shards.main(["convert", str(data_path / "train"), "--out", str(tmp_path / "shards"), "--split", "train"]) == 0
    return tmp_path / "shards"


def diagnosis(name: str, case: Case) -> Finding:
    return examine(doctor.CHECKS[name], case)


def plant_package(folder: Path, name: str, version: str, monkeypatch: pytest.MonkeyPatch, needs: str = "torch (==9.9)") -> None:
    """Write what a wrong `pip install` leaves behind: metadata of another version, which comes first on the path."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {needs}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_on_a_sound_machine_nothing_fails_and_what_does_not_apply_is_skipped(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(QUICKSTART), "data.batch_size=8", "--data", str(shards), "--out", str(tmp_path / "runs"), "--json"]
    assert doctor.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(doctor.CHECKS)
    assert {row["name"] for row in rows if row["status"] == "fail"} == set()
    assert all(row["text"] for row in rows)
    assert set(rows[0]) == {"name", "status", "text", "fix", "seconds"}
    assert list((tmp_path / "runs").iterdir()) == []  # nothing of the trials is left


def test_a_damaged_shard_is_exit_code_1_with_a_suggested_fix(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = open_index(shards / "train")
    for shard, offset in index.samples[["shard", "offset"]].tolist():
        with index.shard_path(shard).open("r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * 64)
    assert doctor.main(["--data", str(shards), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "fail  shards: 32 of 32" in said
    assert "-> copy the shard again, or convert again" in said


def cut_short(train: Path) -> None:
    path = min(train.glob("*.tar"))
    os.truncate(path, path.stat().st_size // 2)


def lose_a_shard(train: Path) -> None:
    min(train.glob("*.tar")).unlink()


def zero_the_index(train: Path) -> None:
    path = train / "index.npy"
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut_short, lose_a_shard, zero_the_index])
def test_an_index_that_does_not_belong_to_the_shards_fails(damage: Callable[[Path], None], shards: Path) -> None:
    damage(shards / "train")
    finding = diagnosis("shards", Case(data=str(shards)))
    assert finding.status == "fail"
    assert finding.fix == f"python tools/make_shards.py verify {shards}"


def test_a_manifest_of_another_folder_fails(shards: Path) -> None:
    path = shards / "train" / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = "other-000000.tar"
    path.write_text(json.dumps(content))
    finding = diagnosis("shards", Case(data=str(shards)))
    assert finding.status == "fail"
    assert "manifest.json: of other tars than these" in finding.text


def test_images_that_do_not_decode_fail(shards: Path) -> None:
    index = open_index(split_folder("custom", str(shards), "train"))
    for row in range(len(index)):
        sample = index.samples[row]
        with (shards / "train" / index.shards[sample["shard"]]).open("r+b") as file:
            file.seek(int(sample["offset"]) + 40)
            file.write(bytes(int(sample["size"]) - 40))
    finding = diagnosis("shards", Case(data=str(shards)))
    assert finding.status == "fail"
    assert finding.text.startswith("32 of 32: ")
    assert "copy the shard again" in finding.fix


def test_a_torchvision_of_another_torch_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path, "torchvision", "0.1.0", monkeypatch)
    finding = diagnosis("packages", Case())
    assert finding.status == "fail"
    assert "torchvision needs ==9.9" in finding.text
    assert "requirements.lock" in finding.fix


def test_a_decoder_of_another_dali_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path, "nvidia-nvimgcodec-cu12", "0.1.0", monkeypatch)
    finding = diagnosis("DALI and nvImageCodec", Case())
    assert finding.status == "fail"
    assert "nvidia-nvimgcodec-cu12 is 0.1.0" in finding.text


def test_two_dalis_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path, "nvidia-dali-cuda130", "2.4.0", monkeypatch)
    finding = diagnosis("DALI and nvImageCodec", Case())
    assert finding.status == "fail"
    assert "pip uninstall --yes nvidia-dali-cuda120 nvidia-dali-cuda130" in finding.fix


def test_a_wrong_or_missing_library_of_dali_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are required by DALI, others by the project alone, and some by an extra of a package that DALI requires."""
    for name in ("nvidia-npp-cu12", "nvidia-nvtiff-cu12"):
        with monkeypatch.context() as patch:
            plant_package(tmp_path / name, name, "0.1.0", patch)
            assert f"{name} is 0.1.0, " in diagnosis("packages", Case()).text
    plant_package(tmp_path / "dali", "nvidia-dali-cuda120", "2.4.0", monkeypatch, "not-there (>=1)")
    assert "not-there is missing, nvidia-dali-cuda120 needs >=1" in diagnosis("DALI and nvImageCodec", Case()).text


@pytest.mark.parametrize(("version", "is_old"), [("470.57.02", True), ("595.71.05", False)])
def test_an_old_driver_fails(version: str, is_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Wed Jul 14 18:00:00 UTC 2021\nGCC version: gcc 12.2\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    finding = diagnosis("GPUs", Case())
    assert f"driver {version}" in finding.text
    assert ("install NVIDIA driver 5" in finding.fix) == is_old


def test_a_tiny_shared_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/proc"))  # a file system of size 0
    finding = diagnosis("shared memory", Case())
    assert finding.status == "fail"
    assert "--shm-size=8g" in finding.fix


def test_a_run_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for place in (tmp_path / "runs" / "mine", Path("/proc/runs")):
        finding = diagnosis("run folder", Case(out=place))
        assert finding.status == "fail"
        assert "mount it writable" in finding.fix


def test_more_threads_than_the_container_may_use_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(machine, "CGROUP_QUOTA", tmp_path / "cpu.max")
    finding = diagnosis("cores and threads", Case(load_config(QUICKSTART, ["data.num_workers=4"])))
    assert finding.status == "warn"
    assert finding.fix.startswith("data.num_workers=1,")


def test_a_missing_gpu_fails() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    finding = diagnosis("GPUs", Case(load_config(QUICKSTART, ["device=gpu"])))
    assert finding.status == "fail"
    assert "docker run --gpus all" in finding.fix


def test_a_large_encoder_without_a_gpu_is_a_warning_unless_the_cpu_is_meant() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = ROOT / "configs" / "multicrop_training.yaml"
    finding = diagnosis("GPUs", Case(load_config(config, [])))
    assert finding.status == "warn"
    assert "trains 86 M parameters on the CPU" in finding.text
    for path, device in ((config, "cpu"), (QUICKSTART, "auto")):
        assert diagnosis("GPUs", Case(load_config(path, [f"device={device}"]))).status == "skip"


def test_what_cannot_be_checked_says_why_and_is_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "skip  shards: neither a CONFIG nor --data names shards" in lines
    ok, skipped = (sum(line.startswith(f"{status:4}  ") for line in lines) for status in ("ok", "skip"))
    assert last == f"{ok} ok, 0 with a warning, 0 failed, {skipped} skipped, for the reasons above"


@pytest.mark.gpu
def test_the_gpu_decodes_as_pillow_does() -> None:
    finding = diagnosis("decoder", Case())
    assert finding.status != "fail"
    assert "Pillow on the GPU" in finding.text


def test_wrong_settings_are_reported_as_by_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(QUICKSTART), "data.batch_siz=8"]) == 2
    assert "data.batch_size" in capsys.readouterr().err
