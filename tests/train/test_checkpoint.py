import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from torch import nn

from train.checkpoint import (
    CheckpointWriter,
    DamagedCheckpointError,
    Snapshot,
    Snapshots,
    abandon_others,
    checkpoint_step,
    is_sound,
    list_checkpoints,
    load_checkpoint,
    move_aside,
    newest_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)
from train.optim import build_optimizer
from train.state import RunState


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.blocks(batch)


def trained(seed: int = 0, width: int = 16, name: str = "adamw", device: str = "cpu") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net(width).to(device)
    optimizer = build_optimizer(model, 0.1, (0.9, 0.95), name)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 8).to(next(model.parameters()).device)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


SOUND = {"run": RunState().as_dict(), "loader": {"epoch": 0, "position": 0, "data": None}}


def snapshot_of(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Snapshot:
    return Snapshots(model, optimizer).take({**SOUND, **state})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, optimizer = trained()
    for step in (5, 10, 15, 20):
        write_checkpoint(tmp_path, snapshot_of(model, optimizer, {"step": step, "score": None}))
        prune_checkpoints(tmp_path, keep_last=3, keep_best=0)
    return tmp_path


def test_what_was_saved_is_loaded_bit_for_bit_and_training_goes_on_equally(folder: Path) -> None:
    model, optimizer = trained()
    other, other_optimizer = trained(seed=1)
    assert load_checkpoint(folder / "step_00000020", other, other_optimizer) == {**SOUND, "step": 20, "score": None}
    for _ in range(2):
        batch = torch.randn(4, 8)
        for net, opt in ((model, optimizer), (other, other_optimizer)):
            opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 0.1
            net(batch).square().sum().backward()
            opt.step()
            opt.zero_grad()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_newest_are_kept_and_nothing_partial_stays(folder: Path) -> None:
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000010", "step_00000015", "step_00000020"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000010", "step_00000015", "step_00000020"]


def test_the_best_are_kept_beside_the_newest_and_damaged_ones_count_for_nothing_and_stay(tmp_path: Path) -> None:
    snapshot = snapshot_of(*trained(), {"step": 0, "score": None})
    for step, score in enumerate([0.1, 0.9, None, 0.7, 0.9, 0.2, 0.3]):
        write_checkpoint(tmp_path, replace(snapshot, state={"step": step, "score": score}))
    prune_checkpoints(tmp_path, keep_last=2, keep_best=3)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [1, 3, 4, 5, 6]
    (tmp_path / "step_00000001" / "state.json").write_text("{")
    prune_checkpoints(tmp_path, keep_last=1, keep_best=3)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [1, 3, 4, 6]


def test_the_step_is_that_of_the_content_and_odd_entries_do_not_end_pruning(tmp_path: Path) -> None:
    snapshot, folder = snapshot_of(*trained(), {"step": 0, "score": None}), tmp_path / "checkpoints"
    for step in (10, 20):
        write_checkpoint(folder, replace(snapshot, state={"step": step, "score": None}))
    write_checkpoint(tmp_path, replace(snapshot, state={"step": 5, "score": None})).rename(tmp_path / "elsewhere")
    (folder / "step_00000010").rename(folder / "step_00000099")  # to make it the newest, somebody thought
    (folder / "step_00000005").symlink_to(tmp_path / "elsewhere")
    (folder / "step_00000006").symlink_to(tmp_path / "nowhere")
    (folder / "step_00000007").write_text("a plain file")
    (folder / "step_00000040").write_text("a plain file")
    assert [checkpoint_step(path) for path in list_checkpoints(folder)] == [5, 10, 20]
    assert newest_checkpoint(folder) == folder / "step_00000020"
    for step in (30, 40):
        write_checkpoint(folder, replace(snapshot, state={"step": step, "score": None}))
        prune_checkpoints(folder, keep_last=2, keep_best=0)
    assert [checkpoint_step(path) for path in list_checkpoints(folder)] == [5, 30, 40]
    assert (folder / "step_00000006").is_symlink()
    assert (folder / "step_00000007").read_text() == (folder / "abandoned-1" / "step_00000040").read_text() == "a plain file"
    assert verify_checkpoint(tmp_path / "elsewhere") is None


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Do the work in a process of its own that dies just before the given of its file operations; True if it had so many."""
    if not (child := os.fork()):
        events = count()
        names = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        sys.addaudithook(lambda name, _: os._exit(1) if name in names and next(events) == event else None)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 25))])
def test_after_any_order_of_kills_damages_and_resumes_the_newest_sound_branch_continues_and_nothing_is_lost(
    seed: int, tmp_path: Path
) -> None:
    rng, keep_last, tensors = random.Random(seed), 3, {"weights": torch.arange(8.0)}
    folder = tmp_path / "checkpoints"
    saved: list[str] = []  # the expected sound checkpoints of the present branch: each is the letters of its steps
    left: set[str] = set()  # those of branches that were left
    seen = Counter[str]()

    def content(path: Path) -> str:
        return json.loads((path / "state.json").read_text())["run"]

    def found() -> list[str]:
        return [content(path) for path in list_checkpoints(folder) if is_sound(path)]

    def save(branch: str) -> None:
        write_checkpoint(folder, Snapshot(tensors, tensors, {"step": len(branch), "run": branch, "score": None}))
        prune_checkpoints(folder, keep_last, keep_best=0)

    for _ in range(40):
        newest = newest_checkpoint(folder)
        assert found() == saved
        assert (newest and content(newest)) == (saved[-1] if saved else None)
        branch = ""
        if newest is None and folder.exists():  # only damaged ones: started over
            move_aside([folder], tmp_path, "old")
        elif newest is not None:  # or, on purpose, from an older one
            kept = newest if rng.random() < 0.7 else rng.choice([p for p in list_checkpoints(folder) if is_sound(p)])
            branch, before = content(kept), saved
            is_killed = killed_at(rng.randrange(60), lambda kept=kept: abandon_others(folder, kept))
            seen["killed when moving"] += is_killed
            saved = found()
            assert before[: len(saved)] == saved
            assert saved[-1] == branch or is_killed
            left |= {*before} - {*saved}
            if is_killed:
                continue
        for _ in range(rng.randint(1, 4)):
            branch += "".join(rng.choices(ascii_lowercase, k=rng.randint(0, 3)))
            expected = [*saved, *([branch] if saved[-1:] != [branch] else [])]
            is_killed = killed_at(rng.randrange(80), lambda branch=branch: save(branch))
            seen["killed when saving"] += is_killed
            now = found()
            if is_killed and now[-1:] != expected[-1:]:
                expected = saved
            assert expected[-len(now) :] == now or now == expected == []
            assert len(now) >= min(keep_last, len(expected))
            assert is_killed or len(now) <= keep_last
            saved = now
            if is_killed:
                break
        if (paths := list_checkpoints(folder)) and rng.random() < 0.5:
            path = rng.choice(paths)
            file = path / rng.choice(["model.safetensors", "optimizer.safetensors", "manifest.json"])
            if is_sound(path):
                saved.remove(content(path))
            file.write_bytes(file.read_bytes()[: rng.randrange(max(1, file.stat().st_size))])
            seen["damaged"] += 1
    assert {content(path) for path in tmp_path.glob("**/abandoned-*/*") if is_sound(path)} >= left
    assert len(seen) == 3, seen


def test_a_snapshot_is_of_its_moment_whatever_training_does_while_it_is_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    snapshot = snapshot_of(model, optimizer, {"step": 1, "score": None})
    for parameter in model.parameters():
        parameter.data.zero_()
    other, _ = trained(seed=1)
    load_checkpoint(write_checkpoint(tmp_path, snapshot), other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_snapshots_share_memory_of_the_host_and_each_is_on_disk_before_the_next(device: str, tmp_path: Path) -> None:
    model, optimizer = trained(width=4096, device=device)
    snapshots, writer, places, before = Snapshots(model, optimizer), CheckpointWriter(tmp_path, 9, 0), set(), []

    def take() -> Snapshot:
        assert len(list_checkpoints(tmp_path)) == len(before) - 1
        snapshot = snapshots.take({**SOUND, "step": len(before), "score": None})
        tensors = [*snapshot.model.values(), *snapshot.optimizer.values()]
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
        assert {(tensor.device.type, tensor.is_pinned()) for tensor in tensors} == {("cpu", device == "cuda")}
        return snapshot

    for _ in range(3):
        before.append({name: value.clone() for name, value in model.state_dict().items()})
        writer.write(take)
        take_step(model, optimizer)  # while the snapshot is copied
    writer.wait()
    assert len(places) == 1
    for path, weights in zip(list_checkpoints(tmp_path), before, strict=True):
        load_checkpoint(path, model)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_every_bit_flip_and_truncation_is_detected_and_the_previous_checkpoint_is_used(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    newest = folder / "step_00000020"
    files = sorted(path.name for path in newest.iterdir())
    for trial in range(80):
        copy = tmp_path / f"trial-{trial}"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("trial-*"))
        path = copy / newest.name / files[trial % len(files)]
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        if trial % 3:
            content[place] ^= 1 << rng.randrange(8)
        else:
            del content[place:]
        path.write_bytes(content)
        caplog.clear()
        with pytest.raises(DamagedCheckpointError):
            verify_checkpoint(copy / newest.name)
        assert newest_checkpoint(copy) == copy / "step_00000015"
        (message,) = caplog.messages
        assert "step_00000020" in message
        shutil.rmtree(copy)


def test_every_single_bit_of_the_manifest_counts(folder: Path) -> None:
    manifest = folder / "step_00000020" / "manifest.json"
    whole = manifest.read_bytes()
    for bit in range(8 * len(whole)):
        manifest.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(DamagedCheckpointError):
            verify_checkpoint(manifest.parent)


def test_a_missing_file_counts_as_damage(folder: Path) -> None:
    (folder / "step_00000020" / "optimizer.safetensors").unlink()
    assert newest_checkpoint(folder) == folder / "step_00000015"


def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(folder: Path) -> None:
    model, optimizer = trained(width=12)
    with pytest.raises(ValueError, match="belongs to another architecture") as caught:
        load_checkpoint(folder / "step_00000020", model, optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("saved", "ours"), [("muon", "adamw"), ("adamw", "muon")])
def test_a_checkpoint_of_another_optimiser_is_refused_by_name(saved: str, ours: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot_of(*trained(name=saved), {"step": 3, "score": None}))
    load_checkpoint(path, *trained(name=saved))
    with pytest.raises(ValueError, match=f"training.optimizer={saved}, not {ours}") as caught:
        load_checkpoint(path, *trained(name=ours))
    assert "\n" not in str(caught.value)


def test_a_save_that_was_killed_leaves_the_others_alone(folder: Path) -> None:
    partial = folder / ".step_00000025.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(folder) == folder / "step_00000020"
