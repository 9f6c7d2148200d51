"""The command before and instead of training: its settings, a dry run, and the advice for a step that runs out of memory."""

import mmap
import re
from pathlib import Path

import nvidia.dali
import pytest
import torch

from model.hjepa import HJEPA
from pipeline.crops.device import is_out_of_memory
from tests.train.test_run import QUICKSTART, command
from train.config.load import load_config, load_config_with_origins
from train.run import main, out_of_memory_explained

DALI_SAYS = ("Can't allocate %zu bytes on device %d.", "CUDA allocation failed", "cudaErrorMemoryAllocation")


def test_the_printed_settings_name_their_origins_and_read_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--config", str(QUICKSTART), "--epochs", "3", "--dataset=cifar10", "--resume", "none", "training.lr=1e-3"]
    assert main([*overrides, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    settings = ["training.epochs=3", "data.dataset=cifar10", "checkpoint.resume=none", "training.lr=1e-3"]
    config, origins = load_config_with_origins(QUICKSTART, settings)
    assert load_config(tmp_path / "again.yaml") == config
    lines = [line.split("#") for line in printed.splitlines()]
    assert [line[1].strip() for line in lines if len(line) == 2] == list(origins.values())
    assert origins["data.multicrop.global_crop_size"].startswith(str(QUICKSTART))


def test_a_dry_run_takes_a_step_and_writes_nothing(data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(QUICKSTART, data_path, tmp_path / "runs"), "--dry-run", "training.epochs=26"]) == 0
    said = capsys.readouterr().out
    assert "data: 103 images (103 labelled) in 3 shards" in said
    assert "4x4 tokens in a global crop, 3 levels" in said
    assert "run: 312 steps of 8 images on 1 rank(s), 12 steps an epoch" in said
    assert re.search(r"step: 8 images with 8 crops on each rank took \d+\.\d s.* raised the memory of this process", said)
    assert not (tmp_path / "runs").exists()
    assert main([*command(QUICKSTART, data_path, tmp_path / "runs"), "--dry-run", "model.encoder=resnet18"]) == 2


def test_a_dry_run_under_torchrun_uses_the_gpu_of_its_rank(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    arguments = [*command(QUICKSTART, data_path, tmp_path, "device=gpu"), "--dry-run"]
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(arguments) == 2
    assert "--nproc_per_node=2" in capsys.readouterr().err
    assert chosen == []
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert main(arguments) == 2  # the loader finds no GPU
        assert chosen == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("crop_device", ["auto", "gpu", "dali", "cpu"])
def test_a_dry_run_on_a_gpu_that_is_not_there_is_one_line(
    crop_device: str, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(QUICKSTART, data_path, tmp_path, "device=gpu", f"data.crop_device={crop_device}")
    assert main([*arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "device: gpu, but torch sees no GPU here" in error


REMEDIES = (
    r"out of memory: a step does not fit the memory of cpu.*num_local_crops \(now 6\), data.batch_size \(now 8\) or "
    r"data.multicrop.local_crop_size \(now 16\).*grad_checkpointing=true"
)


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError(f"Error in GPU operator `nvidia.dali.fn.resize`: {text.replace('%zu', '64')}") for text in DALI_SAYS),
        ValueError("shards/train: DALI failed on one of 8 samples: Can't allocate 64 bytes on device 0."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"),
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=str,
)
def test_every_way_to_run_out_of_memory_is_answered_with_settings_in_their_order(
    error: Exception, data_path: Path, tmp_path: Path
) -> None:
    assert is_out_of_memory(error)
    path, *overrides = command(QUICKSTART, data_path, tmp_path)
    config, device = load_config(Path(path), overrides), torch.device("cpu")
    with pytest.raises(ValueError, match=REMEDIES) as caught, out_of_memory_explained(config, device):
        raise error
    assert "\n" not in str(caught.value)
    other = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError) as kept, out_of_memory_explained(config, device):
        raise other
    assert kept.value is other


def test_the_installed_dali_says_what_is_looked_for() -> None:
    with (Path(nvidia.dali.__file__).parent / "libdali_core.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert [text for text in DALI_SAYS if library.find(text.encode()) < 0] == []


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_out_of_memory_ends_the_command_with_one_line(
    options: list[str], data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def forward(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    with monkeypatch.context() as context:
        context.setattr(HJEPA, "forward", forward)
        code = main([*command(QUICKSTART, data_path, tmp_path), *options])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(REMEDIES, error)
