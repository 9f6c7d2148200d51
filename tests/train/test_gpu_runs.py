"""Whole commands on a GPU. The same bodies run on the CPU in `make soak`, so that no mistake in them waits for a GPU."""

import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.shards.index import open_index, save_index
from tests.train.test_run import QUICKSTART, command, interrupt_at_step
from train import evaluate
from train.run import main

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_each_crop_device = pytest.mark.parametrize("crop_device", ["gpu", "dali", "cpu"])
STEPS = 20
READER = ("data.num_workers=2",)


def arguments(device: str, crop_device: str, data_path: Path, run_dir: Path, *changes: str) -> list[str]:
    """The arguments of a run of 20 steps. Where the CPU replaces the GPU, it makes the crops too."""
    crop_device = crop_device if device == "gpu" or crop_device == "auto" else "cpu"
    settings = ["training.epochs=2", f"training.max_steps={STEPS}", "logging.log_frequency=1"]
    settings += [f"device={device}", f"data.crop_device={crop_device}", *changes]
    return command(QUICKSTART, data_path, run_dir, *settings)


def lines_of(run: Path) -> list[dict[str, float]]:
    """The logged lines of steps, without those of an evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@on_each_device
@pytest.mark.parametrize("crop_device", ["auto", "dali", "cpu"])
def test_twenty_steps_train_evaluate_and_report(device: str, crop_device: str, data_path: Path, tmp_path: Path) -> None:
    changes = ("evaluation.eval_frequency=1", "logging.pictures=true")
    assert main(arguments(device, crop_device, data_path, tmp_path, *changes)) == 0
    run = tmp_path / "quickstart"
    summary, lines = json.loads((run / "summary.json").read_text()), lines_of(run)
    assert (summary["steps"], summary["images"]) == (STEPS, 8 * STEPS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in lines)
    assert 0 <= summary["knn"]["trained"] <= 100
    assert (run / "checkpoints" / f"step_{STEPS:08d}").is_dir()
    assert (run / "figures" / "crops.png").exists()
    assert not (run / "quarantine.jsonl").exists()
    if device == "gpu":
        assert lines[-1]["device_memory_bytes"] >= lines[-1]["peak_memory_bytes"] > 0


@on_each_device
def test_a_dry_run_takes_a_step_on_the_device_and_says_what_it_used(
    device: str, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(device, "auto", data_path, tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "8 images with 8 crops on each rank took" in said
    assert ("GiB of cuda:0 are in use" if device == "gpu" else "memory of this process") in said
    assert list(tmp_path.iterdir()) == []


@on_each_device
@on_each_crop_device
def test_a_run_that_is_stopped_and_resumed_takes_the_steps_of_one_that_is_not(
    device: str, crop_device: str, data_path: Path, tmp_path: Path
) -> None:
    """In float32. Bit for bit on a CPU; on a GPU, sums run in any order, and the JPEG engine rounds as it likes."""
    changes = (*READER, "training.use_amp=false", "checkpoint.save_frequency=7")
    given = arguments(device, crop_device, data_path, tmp_path, *changes)
    assert main([*given, "logging.run_name=whole"]) == 0
    watcher = interrupt_at_step(tmp_path / "parts", 3, signal.SIGTERM)
    assert main([*given, "logging.run_name=parts"]) == 75
    watcher.join()
    assert main([*given, "logging.run_name=parts"]) == 0
    whole, parts = ([(line["step"], line["loss"]) for line in lines_of(tmp_path / name)] for name in ("whole", "parts"))
    assert [step for step, _ in parts] == [step for step, _ in whole]
    rounding = 0.0 if device == "cpu" else 2e-3
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=rounding, abs=0)
    losses = [loss for _, loss in whole]
    assert losses[1:] != pytest.approx(losses[:-1], rel=2e-3)  # one step off would be noticed


@pytest.fixture
def damaged(data_path: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the shards in which one image is filled with zeros, and that image's key."""
    folder = tmp_path / "damaged"
    shutil.copytree(data_path, folder)
    index = open_index(folder / "train")
    save_index(folder / "train", list(index.shards), index.samples)  # as it was before the damage
    sample = index.samples[50]
    with (folder / "train" / index.shards[int(sample["shard"])]).open("r+b") as tar:
        tar.seek(int(sample["offset"]))
        tar.write(bytes(int(sample["size"])))
    return folder, index.key(50)


@on_each_device
@on_each_crop_device
def test_a_damaged_image_is_replaced_and_named_and_no_other(
    device: str, crop_device: str, damaged: tuple[Path, str], tmp_path: Path
) -> None:
    data_path, key = damaged
    changes = ("training.max_steps=13", "evaluation.linear_epochs=0")
    given = arguments(device, crop_device, data_path, tmp_path, *READER, *changes)
    assert main(given) == 0
    run = tmp_path / "quickstart"
    (line,) = (run / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["key"], entry["reason"]) == (key, "filled with zeros")
    assert lines_of(run)[-1]["bad_samples"] == 1
    assert json.loads((run / "summary.json").read_text())["bad_samples"] == 1


@pytest.fixture
def _torch_as_before() -> Iterator[None]:
    """The command makes torch deterministic in its process."""
    yield
    torch.use_deterministic_algorithms(False)


@on_each_device
@pytest.mark.usefixtures("_torch_as_before")
def test_all_probes_measure_on_the_device_what_they_measure_on_the_cpu(device: str, data_path: Path, tmp_path: Path) -> None:
    assert main(arguments(device, "auto", data_path, tmp_path, "training.max_steps=2")) == 0
    reports = {}
    for place in {device, "cpu"}:
        out = tmp_path / f"{place}.json"
        probes = ["--probe", "knn", "linear", "--device", place, "--json", str(out)]
        assert evaluate.main([str(tmp_path / "quickstart"), *probes]) == 0
        reports[place] = {  # the linear probe chooses its setting by its accuracy
            (score["probe"], score["features"], score["setting"] if score["probe"] == "knn" else ""):
            score["accuracy"] for score in json.loads(out.read_text())["figures"]
        }  # fmt: skip
    assert reports[device].keys() == reports["cpu"].keys()
    assert {probe for probe, _, _ in reports[device]} == {"knn", "linear"}
    for (probe, features, setting), accuracy in reports[device].items():
        assert 0 <= accuracy <= 100
        if (probe, features) == ("knn", "pixels"):  # of 24 images, two may be judged otherwise: decoders round
            assert accuracy == pytest.approx(reports["cpu"][probe, features, setting], abs=100 * 2 / 24 + 1e-6)
