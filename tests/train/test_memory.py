"""Running out of memory, whoever says so, and what is known of the memory that DALI holds."""

import mmap
from pathlib import Path

import numpy as np
import nvidia.dali
import pytest
import torch

from pipeline.crops.device import is_out_of_memory
from pipeline.shards.index import open_index
from tests.train.test_run import ROOT, command
from train.build import build_dataset, build_training_loader
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.measure import rankme
from train.memory import held_by_others, out_of_memory_explained, pipeline_bytes
from train.monitor import memory_metrics
from train.run import main

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
GPU, GIB = torch.device("cuda", 0), 2**30
DALI_SAYS = ("Can't allocate %zu bytes on device %d.", "CUDA allocation failed", "cudaErrorMemoryAllocation")


@pytest.fixture
def config(data_path: Path, tmp_path: Path) -> Config:
    path, *overrides = command(QUICKSTART, data_path, tmp_path)
    return load_config(Path(path), overrides)


@pytest.mark.parametrize(
    "error",
    [
        *(
            RuntimeError(f"Error in GPU operator `nvidia.dali.fn.resize`: {text.replace('%zu', '64')}")
            for text in DALI_SAYS
        ),
        ValueError("shards/train: DALI failed on one of 8 samples: Can't allocate 64 bytes on device 0."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"),
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=str,
)
def test_every_way_to_run_out_of_memory_is_answered_with_settings(error: Exception, config: Config) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(ValueError, match="out of memory: a step does not fit") as caught, \
            out_of_memory_explained(config, torch.device("cpu")):  # fmt: skip
        raise error
    assert "data.batch_size" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_error_stays_as_it_is(config: Config) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError) as caught, out_of_memory_explained(config, torch.device("cpu")):
        raise error
    assert caught.value is error


def test_the_installed_dali_says_what_is_looked_for() -> None:
    with (Path(nvidia.dali.__file__).parent / "libdali_core.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert [text for text in DALI_SAYS if library.find(text.encode()) < 0] == []


def test_memory_that_dali_holds_is_measured_and_named_in_the_advice(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of 80 GiB with 10 free, of which torch has taken 50."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 45 * GIB)
    assert held_by_others(GPU) == 20 * GIB
    assert held_by_others(torch.device("cpu")) == 0
    assert memory_metrics(GPU) == {"peak_memory_bytes": 45 * GIB, "device_memory_bytes": 70 * GIB}
    with (
        pytest.raises(ValueError, match=r"80\.0 GiB of cuda:0, 20\.0 GiB of which"),
        out_of_memory_explained(config, GPU),
    ):
        raise MemoryError


def test_the_estimate_of_the_pipeline_grows_by_a_batch_of_crops_for_each_batch_made_ahead(
    config: Config, data_path: Path
) -> None:
    index = open_index(data_path / "train")
    more = config.model_copy(update={"data": config.data.model_copy(update={"prefetch": config.data.prefetch + 1})})
    batch = next(iter(build_training_loader(config, build_dataset(config))))
    made = sum(crop.nbytes for crop in batch.crops)
    assert pipeline_bytes(more, index) - pipeline_bytes(config, index) == pytest.approx(made)
    sides = index.samples["height"].astype(float) * index.samples["width"]
    rest = config.data.batch_size * 3 * sides.mean() + 4 * made
    assert pipeline_bytes(config, index) == pytest.approx((config.data.prefetch + 1) * made + rest)


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
@pytest.mark.parametrize("crop_device", ["auto", "gpu", "cpu"])
def test_a_dry_run_on_a_gpu_that_is_not_there_is_one_line(
    crop_device: str, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(QUICKSTART, data_path, tmp_path, "device=gpu", f"data.crop_device={crop_device}")
    assert main([*arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "device: gpu, but torch sees no GPU here" in error


@pytest.mark.parametrize(
    ("count", "width", "rank"), [(512, 384, 384), (64, 384, 64), (300, 64, 7), (40, 40, 1), (2, 8, 2)]
)
def test_rankme_equals_its_definition_by_singular_values(count: int, width: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, rank)) @ (rng.normal(size=(rank, width)) * rng.uniform(0.1, 3, (rank, 1)))
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert rankme(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-5)  # sqrt of float64's precision
    assert rankme(torch.from_numpy(features).float()) == pytest.approx(expected, rel=1e-4)
