"""Shards that are away, cut off or exchanged while a run reads them: waited for, never blamed on the images, nothing lost."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import build_multicrop_dataloader, build_multicrop_dataset, window
from pipeline.loader import MultiCropLoader
from pipeline.shards.index import open_index, save_index
from pipeline.shards.watch import StoreError
from tests.train.test_ranks import torchrun, wait_for_step
from tests.train.test_run import QUICKSTART, command
from train.checkpoint import list_checkpoints
from train.run import main

BATCH, SECOND = 8, "photos-000001.tar"


@pytest.fixture
def folder(data_path: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(data_path / "train", tmp_path / "shards" / "train"))
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)
    shutil.copytree(data_path / "val", tmp_path / "shards" / "val")
    return folder


def loader_of(folder: Path, retry_s: float, quarantine: Path | None = None) -> MultiCropLoader:
    dataset = build_multicrop_dataset("custom", folder.parent, num_local_crops=0, global_crop_size=32)
    return build_multicrop_dataloader(
        dataset, BATCH, device="cpu", num_workers=1, normalized=False, quarantine=quarantine, prefetch=1, retry_s=retry_s
    )


def exchange(path: Path, content: bytes) -> Callable[[], None]:
    """Put another file in the place of a tar; returns what puts the tar back."""
    kept = path.with_suffix(".kept")
    path.rename(kept)
    path.write_bytes(content)
    return lambda: kept.replace(path) and None


def take_away(folder: Path) -> Callable[[], None]:
    away = folder.with_name("away")
    folder.rename(away)
    return lambda: away.rename(folder) and None


FAULTS: dict[str, Callable[[Path], Callable[[], None]]] = {
    "the folder is away": take_away,
    "a tar is cut in half": lambda f: exchange(f / SECOND, (f / SECOND).read_bytes()[:80_000]),
    "a tar is full of zeros": lambda f: exchange(f / SECOND, bytes((f / SECOND).stat().st_size)),
    "a tar is another one": lambda f: exchange(f / SECOND, (f / "photos-000000.tar").read_bytes()),
    "a tar is gone": lambda f: (lambda kept: lambda: kept.rename(f / SECOND) and None)((f / SECOND).rename(f / "kept")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_comes_back_in_time_costs_nothing(
    folder: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every image of the epoch is the one of an undisturbed loader, and none is quarantined."""
    monkeypatch.setattr(window, "WINDOW_ROWS", 3 * BATCH)  # so that many graphs open their tars
    expected = list(loader_of(folder, 60))
    loader = loader_of(folder, 60, tmp_path / "quarantine.jsonl")
    batches = iter(loader)
    ours = [next(batches)]
    restore = FAULTS[fault](folder)
    threading.Thread(target=restore_when_noticed, args=(caplog, restore), daemon=True).start()
    ours += batches
    assert len(ours) == len(expected) == 103 // BATCH
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
    assert len(loader.quarantine) == 0
    assert not (tmp_path / "quarantine.jsonl").exists()


def restore_when_noticed(caplog: pytest.LogCaptureFixture, restore: Callable[[], None]) -> None:
    while "waiting up to 60 s" not in caplog.text:
        threading.Event().wait(0.01)
    restore()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_come_back_is_named_and_blamed_on_no_image(
    folder: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "WINDOW_ROWS", 3 * BATCH)
    loader = loader_of(folder, 0.3, tmp_path / "quarantine.jsonl")
    batches = iter(loader)
    next(batches)
    FAULTS[fault](folder)
    with pytest.raises(StoreError, match=r"photos-00000\d\.tar: .*tried for 0\.3 s") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_bytes_that_were_read_in_full_are_still_the_images_fault(folder: Path, tmp_path: Path) -> None:
    index = open_index(folder)
    content = bytearray((folder / SECOND).read_bytes())
    row = 41 + 5
    start = int(index.samples["offset"][row])
    content[start : start + 300] = bytes(300)
    (folder / SECOND).write_bytes(content)
    loader = loader_of(folder, 60, tmp_path / "quarantine.jsonl")
    assert len(list(loader)) == 103 // BATCH
    assert list(loader.quarantine.reasons) == [row]


def test_a_sample_that_ends_early_is_an_error_of_the_storage(folder: Path) -> None:
    index = open_index(folder)
    os.truncate(folder / SECOND, int(index.samples["offset"][45]) + 10)
    assert len(index.encoded(44)) == index.samples["size"][44]
    with pytest.raises(StoreError, match=rf"{SECOND}: ends after [\d,]+ bytes, inside a sample"):
        index.encoded(45)


def end_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run / "checkpoints")[-1] / "model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_whose_shard_is_cut_off_saves_stops_and_continues_as_if_nothing_had_happened(
    folder: Path, tmp_path: Path, accumulation: int, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.max_steps=24", "checkpoint.save_frequency=100", "logging.log_frequency=1", "data.store_retry_s=0.3"]
    settings += ["evaluation.eval_frequency=0", f"training.accumulation_steps={accumulation}"]
    whole, cut = (command(QUICKSTART, folder.parent, tmp_path, *settings, f"logging.run_name={n}") for n in ("whole", "cut"))
    assert main(whole) == 0
    log = tmp_path / "cut" / "metrics.jsonl"
    restored = []

    def cut_off() -> None:
        while not log.exists() or log.read_text().count("\n") < 3:
            threading.Event().wait(0.001)
        restored.extend(exchange(tar, b"") for tar in sorted(folder.glob("*.tar")))

    threading.Thread(target=cut_off, daemon=True).start()
    capfd.readouterr()
    assert main(cut) == 2
    last = [line for line in capfd.readouterr().out.splitlines() if line.strip()][-1]
    assert "changed since the run began, tried for 0.3 s" in last
    (saved,) = list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert f"stopped at step {int(saved.name[5:])}; the same command continues from there" in last
    assert not (tmp_path / "cut" / "quarantine.jsonl").exists()
    assert json.loads((tmp_path / "cut" / "heartbeat.json").read_text())["status"] == "failed"
    for restore in restored:
        restore()
    assert main(cut) == 0
    ours, theirs = end_of(tmp_path / "cut"), end_of(tmp_path / "whole")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_an_outage_of_the_shards_for_five_seconds_changes_no_weight(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.max_steps=200", "checkpoint.save_frequency=100", "logging.log_frequency=1"]
    whole, cut = (command(QUICKSTART, folder.parent, tmp_path, *settings, f"logging.run_name={n}") for n in ("whole", "cut"))
    assert main(whole) == 0
    log = tmp_path / "cut" / "metrics.jsonl"

    def outage() -> None:
        while not log.exists() or log.read_text().count("\n") < 10:
            threading.Event().wait(0.001)
        restore = take_away(folder)
        threading.Event().wait(5)
        restore()

    thread = threading.Thread(target=outage, daemon=True)
    thread.start()
    assert main(cut) == 0
    thread.join()
    assert "No such file or directory; waiting up to 120 s for it" in capfd.readouterr().out
    logs = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "cut")]
    assert [line.get("loss") for line in logs[0]] == [line.get("loss") for line in logs[1]]
    ours, theirs = end_of(tmp_path / "cut"), end_of(tmp_path / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "cut" / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_ranks_that_lose_their_shards_save_together_and_continue(folder: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=60", "checkpoint.save_frequency=1000", "logging.log_frequency=1", "data.store_retry_s=1"]
    arguments = command(QUICKSTART, folder.parent, tmp_path, *settings, "evaluation.eval_frequency=0")
    process = torchrun(arguments)
    wait_for_step(tmp_path / "quickstart", 3, process)
    restore = take_away(folder)
    said = process.communicate()[0]
    assert "exitcode  : 2" in said, said  # torchrun ends the other rank, if that is slower to leave
    (saved,) = list_checkpoints(tmp_path / "quickstart" / "checkpoints")
    assert f"tried for 1 s. Restore the shards as they were; stopped at step {int(saved.name[5:])}" in said
    restore()
    process = torchrun(arguments)
    assert process.wait() == 0, process.communicate()[0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert steps[:60] == list(range(1, 61))
