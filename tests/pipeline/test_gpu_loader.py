"""The loader on a GPU: hybrid crops, windows built in the background, and the choice of its settings."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from nvidia.dali import Pipeline, backend

from pipeline import build_multicrop_dataloader, build_multicrop_dataset, window
from pipeline.dataset import CropBatch
from pipeline.loader import MultiCropLoader

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_each_crop_device = pytest.mark.parametrize("crop_device", ["gpu", "dali", "cpu"])
BATCH, WINDOW_BATCHES = 8, 3


def loader_of(data_path: Path, device: str, crop_device: str, **options: object) -> MultiCropLoader:
    """Where the CPU stands for the GPU, it makes the crops too."""
    dataset = build_multicrop_dataset("custom", data_path, global_crop_size=64, local_crop_size=32)
    crop_device = "cpu" if (device, crop_device) == ("cpu", "gpu") else crop_device
    given = {"num_workers": 2, "normalized": False, "device": device, "crop_device": crop_device}
    return build_multicrop_dataloader(dataset, BATCH, **{**given, **options})


def used_on_gpu() -> int:
    """Bytes that are not torch's."""
    gc.collect()
    if torch.cuda.is_available():
        backend.ReleaseUnusedMemory()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def assert_same(batch: CropBatch, expected: CropBatch, levels: float) -> None:
    """All but the crops are equal; each crop differs by at most so many grey levels in its mean."""
    for name in ("labels", "boxes", "flips", "positions"):
        assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name).cpu()), name
    for crop, other in zip(batch.crops, expected.crops, strict=True):
        assert crop.dtype == torch.uint8
        difference = (crop.cpu().int() - other.cpu().int()).abs().float()
        assert float(difference.mean()) <= levels


@on_each_device
def test_uploaded_crops_are_those_of_the_cpu_bit_for_bit(device: str, data_path: Path) -> None:
    for batch, expected in zip(loader_of(data_path, device, "cpu"), loader_of(data_path, "cpu", "cpu"), strict=True):
        kinds = {part.device.type for part in (*batch.crops, batch.labels, batch.boxes, batch.flips, batch.positions)}
        assert kinds == {"cuda" if device == "gpu" else "cpu"}
        assert_same(batch, expected, levels=0)


@on_each_device
@on_each_crop_device
def test_windows_built_in_the_background_make_the_same_batches_and_leave_nothing(
    device: str, crop_device: str, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(loader_of(data_path, device, crop_device))
    monkeypatch.setattr(window, "WINDOW_ROWS", WINDOW_BATCHES * BATCH)
    loader, graphs, used = loader_of(data_path, device, crop_device), list[weakref.ref[Pipeline]](), list[int]()
    for epoch in range(2):
        for batch, expected in zip(loader, whole, strict=True):
            if epoch == 0:
                assert_same(batch, expected, levels=0 if loader.reader.crop_device == "cpu" else 0.1)
            if not graphs or graphs[-1]() is not loader._window.graph:
                graphs.append(weakref.ref(loader._window.graph))
        if device == "gpu":
            used.append(used_on_gpu())
    assert len(graphs) == 2 * len(whole) // WINDOW_BATCHES
    gc.collect()
    assert [graph() is None for graph in graphs] == [True] * (len(graphs) - 1) + [False]
    loader.close()
    gc.collect()
    assert [graph() for graph in graphs] == [None] * len(graphs)
    if device == "gpu":
        assert used[1] <= 1.2 * used[0]
