import gc
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.dataset import MultiCropDataset, centre_crop_dataset
from pipeline.loader import MultiCropLoader
from pipeline.shards.index import ShardIndex, open_index, save_index


@pytest.fixture(scope="module")
def dataset(data_path: Path) -> MultiCropDataset:
    return build_multicrop_dataset("custom", data_path, global_crop_size=32, local_crop_size=16)


def loader_of(dataset: MultiCropDataset, batch_size: int, **options: object) -> MultiCropLoader:
    return build_multicrop_dataloader(dataset, batch_size, device="cpu", **{"seed": 4, "num_workers": 1, **options})


def crops_of(loader: MultiCropLoader) -> list[torch.Tensor]:
    batches = list(loader)
    return [torch.cat([batch.crops[v] for batch in batches]) for v in range(len(batches[0].crops))]


@pytest.fixture(scope="module")
def epoch(dataset: MultiCropDataset) -> list[torch.Tensor]:
    return crops_of(loader_of(dataset, 8))


def test_a_batch_unpacks_into_crops_and_labels(dataset: MultiCropDataset) -> None:
    crops, labels = next(iter(loader_of(dataset, 8)))
    assert [tuple(crop.shape) for crop in crops] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 6
    assert labels.shape == (8,)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(("batch_size", "options"), [(16, {}), (5, {"num_workers": 2}), (8, {"prefetch": 4})])
def test_crops_are_identical_for_any_batch_size_and_thread_count(
    dataset: MultiCropDataset, epoch: list[torch.Tensor], batch_size: int, options: dict[str, int]
) -> None:
    for ours, reference in zip(crops_of(loader_of(dataset, batch_size, **options)), epoch, strict=True):
        common = min(len(ours), len(reference))
        assert common >= 96
        assert torch.equal(ours[:common], reference[:common])


@pytest.mark.parametrize("world_size", [2, 3])  # 1 to 64 ranks: test_order.py
def test_all_ranks_together_see_every_position_once(dataset: MultiCropDataset, world_size: int) -> None:
    steps, seen = [], []
    for rank in range(world_size):
        batches = list(loader_of(dataset, 4, rank=rank, world_size=world_size))
        steps.append(len(batches))
        seen += [int(position) for batch in batches for position in batch.positions]
    whole = 103 // (4 * world_size)
    assert steps == [whole] * world_size
    assert sorted(seen) == list(range(whole * 4 * world_size))


def test_a_global_batch_is_the_same_crops_for_any_world_size(dataset: MultiCropDataset, epoch: list[torch.Tensor]) -> None:
    for rank in range(3):
        for batch in loader_of(dataset, 4, rank=rank, world_size=3):
            for v, crop in enumerate(batch.crops):
                within = batch.positions[batch.positions < len(epoch[v])]
                assert torch.equal(crop[: len(within)], epoch[v][within])


def test_ranks_may_come_and_go_in_the_middle_of_an_epoch(dataset: MultiCropDataset) -> None:
    state, seen = {"epoch": 2, "position": 0}, []
    for world_size, steps in ((1, 5), (2, 3), (4, 2), (3, 2)):
        for rank in range(world_size):
            loader = loader_of(dataset, 4, rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            for _, batch in zip(range(steps), loader, strict=False):
                seen += batch.positions.tolist()
            after = loader.state_dict()
        state = after
    assert sorted(seen) == list(range(4 * (5 + 6 + 8 + 6)))


def test_resuming_at_any_step_continues_pixel_for_pixel(dataset: MultiCropDataset) -> None:
    whole = []
    loader = loader_of(dataset, 16)
    for _ in range(3):
        whole += [(loader.state_dict(), batch) for batch in loader]
    for k in np.random.default_rng(0).choice(len(whole) - 1, 6, replace=False):
        resumed = loader_of(dataset, 16)
        resumed.load_state_dict(whole[k][0])  # the state while batch k was in use
        expected = whole[k + 1][1]
        batch = next(iter(resumed), None) or next(iter(resumed))  # an empty rest of an epoch, then the next
        assert torch.equal(batch.positions, expected.positions)
        assert all(torch.equal(a, b) for a, b in zip(batch.crops, expected.crops, strict=True))


def test_labels_and_boxes_belong_to_the_samples_of_the_plan(dataset: MultiCropDataset) -> None:
    loader = loader_of(dataset, 16)
    for batch in loader:
        rows = loader.sequence.plan.rows(0, int(batch.positions[0]), int(batch.positions[-1]) + 1)
        np.testing.assert_array_equal(batch.labels, dataset.index.samples["label"][rows])
        assert bool(((batch.boxes >= 0) & (batch.boxes <= 1)).all())
        assert bool((batch.boxes[..., :2] < batch.boxes[..., 2:]).all())


def test_evaluation_sees_every_sample_once_in_stored_order(index: ShardIndex) -> None:
    dataset = centre_crop_dataset(index, 32, 0.875)
    batches = list(loader_of(dataset, 16, shuffle=False, drop_last=False))
    assert [len(batch.labels) for batch in batches] == [16] * 6 + [7]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(103))


def test_set_epoch_goes_to_the_start_of_that_epoch(dataset: MultiCropDataset) -> None:
    loader, other = loader_of(dataset, 16), loader_of(dataset, 16)
    list(loader)
    list(loader)
    other.set_epoch(1)
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader)).crops[0], next(iter(other)).crops[0])


def test_too_small_a_data_set_is_refused_with_the_numbers(dataset: MultiCropDataset) -> None:
    with pytest.raises(ValueError, match=r"103 samples are fewer than one global batch of 128 \(batch_size 64 x 2 ranks\)"):
        loader_of(dataset, 64, world_size=2)


def damaged_copy(data_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_path / "train", tmp_path / "train"))


@pytest.mark.parametrize("defect", ["missing", "truncated", "zeroed", "empty"])
def test_a_defective_shard_is_one_clear_error_at_start(data_path: Path, tmp_path: Path, defect: str) -> None:
    folder = damaged_copy(data_path, tmp_path)
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)
    shard = folder / "photos-000001.tar"
    content = shard.read_bytes()
    if defect == "missing":
        shard.unlink()
    else:
        shard.write_bytes({"truncated": content[: len(content) // 2], "zeroed": bytes(len(content)), "empty": b""}[defect])
    with pytest.raises(ValueError, match=r"photos-000001\.tar") as caught:
        open_index(folder)
    assert "\n" not in str(caught.value)


def test_a_state_belongs_to_its_samples_wherever_their_folder_lies(
    dataset: MultiCropDataset, data_path: Path, tmp_path: Path
) -> None:
    state = {**loader_of(dataset, 8).state_dict(), "epoch": 3, "position": 16}
    moved = damaged_copy(data_path, tmp_path)
    index = open_index(moved)
    other = build_multicrop_dataset("custom", tmp_path, global_crop_size=32, local_crop_size=16)
    loader_of(other, 8).load_state_dict(state)
    save_index(moved, list(index.shards), index.samples)
    assert open_index(moved).digest == dataset.index.digest  # scanned or read from a file
    samples = index.samples.copy()
    samples["label"][7] += 1
    save_index(moved, list(index.shards), samples)
    changed = loader_of(build_multicrop_dataset("custom", tmp_path, global_crop_size=32, local_crop_size=16), 8)
    with pytest.raises(ValueError, match="belongs to another data set") as caught:
        changed.load_state_dict(state)
    assert str(moved) in str(caught.value)
    del state["data"]  # saved before states had it
    changed.load_state_dict(state)
    assert changed.state_dict() == {"epoch": 3, "position": 16, "data": open_index(moved).digest}


def test_missing_shards_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make_shards.py convert SOURCE --out .* --val-ratio 0.1`"):
        build_multicrop_dataset("imagenet", tmp_path)


def test_a_forked_process_does_not_wait_for_a_graph_that_its_parent_left_behind(dataset: MultiCropDataset) -> None:
    """A pipeline shuts down by joining its threads, which a fork does not copy: whoever collects it there waits for ever."""
    gc.disable()
    try:
        loader = loader_of(dataset, 8)
        next(iter(loader))
        cycle: list[object] = [loader]
        cycle.append(cycle)
        del loader, cycle
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(30)
        ended = child.exitcode
        child.kill()
    finally:
        gc.enable()
    assert ended == 0
