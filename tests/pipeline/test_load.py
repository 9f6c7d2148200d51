"""Crops are the same however late they are used: nothing overwrites a batch while the device still has work before it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import build_multicrop_dataloader, build_multicrop_dataset


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checksums(data_path: Path, device: str, num_batches: int, busy: bool) -> list[list[float]]:
    """Position-weighted sums of every crop, whole numbers. `busy`: the device has much to do before it reads a batch."""
    dataset = build_multicrop_dataset("custom", data_path, global_crop_size=64, local_crop_size=32)
    loader = build_multicrop_dataloader(dataset, 16, device=device, num_workers=2, seed=1, normalized=False)
    place = "cuda" if device == "gpu" else "cpu"
    side = 4096 if device == "gpu" else 128
    work = torch.randn(side, side, device=place)
    sums: list[torch.Tensor] = []
    while len(sums) < num_batches:
        for batch in loader:
            if busy:
                for _ in range(20):
                    work = torch.nn.functional.normalize(work @ work)
            flat = [crop.flatten(1).double() for crop in batch.crops]
            weights = [torch.arange(crop.shape[1], device=place, dtype=torch.float64) % 251 for crop in flat]
            sums.append(torch.cat([crop @ weight for crop, weight in zip(flat, weights, strict=True)]))
            del batch  # its memory is DALI's again while the sums may still be waiting their turn
    return torch.stack(sums[:num_batches]).cpu().tolist()


@pytest.mark.parametrize(("device", "num_batches"), [("cpu", 10), pytest.param("gpu", 200, marks=pytest.mark.gpu, id="gpu-200")])
def test_a_busy_device_changes_no_crop(data_path: Path, device: str, num_batches: int) -> None:
    quiet = checksums(data_path, device, num_batches, busy=False)
    assert checksums(data_path, device, num_batches, busy=True) == quiet
    assert len({tuple(sums) for sums in quiet}) == num_batches
