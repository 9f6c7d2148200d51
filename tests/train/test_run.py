"""The command itself, run in this process on real shards, with real signals."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.lock import exclusive
from tests.conftest import without_labels
from train.checkpoint import verify_checkpoint
from train.config.load import load_config
from train.output.log import MetricsLog
from train.run import main
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY_ENCODER = "{img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2, init_values: 0.1, num_reg_tokens: 1}"
TINY = [
    "device=cpu", "data.dataset=custom", "data.batch_size=8", "data.num_workers=1",
    "data.multicrop.global_crop_size=32", "data.multicrop.local_crop_size=16",
    "model.encoder=vit_small_patch16_dinov3", f"model.encoder_kwargs={TINY_ENCODER}",
    "model.predictor_width=16", "model.predictor_depth=1", "model.predictor_heads=2",
    "model.projector_hidden=16", "model.projector_dim=8", "loss.sigreg_slices=8", "logging.tensorboard=false",
    "logging.pictures=false", "training.warmup_epochs=0",
]  # fmt: skip
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
FROM_NOTHING = [path for path in SHIPPED if path.stem not in ("quickstart", "continue", "highres")]


def command(config: Path, data_path: Path, run_dir: Path, *changes: str) -> list[str]:
    given = [*TINY, f"data.data_path={data_path}", f"logging.run_dir={run_dir}", *changes]
    return [str(config), *{override.partition("=")[0]: override for override in given}.values()]


@pytest.fixture(scope="module")
def complete(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps that is complete, with all its pictures."""
    runs = tmp_path_factory.mktemp("complete")
    assert main(command(QUICKSTART, data_path, runs, "training.max_steps=2", "logging.pictures=true")) == 0
    return runs / "quickstart"


def assert_two_steps(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["images"] == 16
    assert set(summary["knn"]) == {"pixels", "colour_histogram", "random_init", "trained"}
    assert 0 <= summary["linear"] <= 100
    assert {"images_per_s", "data_wait_percent", "loss_first", "loss_last", "rankme"} <= set(summary)
    placement = summary["placement"]
    assert set(placement) == {"chance", "pixels", "random_init", "trained", *(f"level_{rung}" for rung in range(3))}
    assert f"<th>k-NN, trained encoder</th><td>{summary['knn']['trained']:.1f} %</td>" in (run / "report.html").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["knn"], last["linear"]) == (2, summary["knn"]["trained"], summary["linear"])
    assert (last["placement"], last["placement_level_1"]) == (placement["trained"], placement["level_1"])
    heartbeat = json.loads((run / "heartbeat.json").read_text())
    assert (heartbeat["status"], heartbeat["step"], heartbeat["total_steps"]) == ("complete", 2, 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002"]


@pytest.mark.parametrize("config", FROM_NOTHING, ids=lambda path: path.stem)
def test_every_shipped_config_takes_two_steps_at_reduced_size(config: Path, data_path: Path, tmp_path: Path) -> None:
    assert main(command(config, data_path, tmp_path, "training.max_steps=2", "logging.run_name=two")) == 0
    assert_two_steps(tmp_path / "two")


def test_a_complete_run_is_reported_with_pictures_and_is_neither_trained_nor_evaluated_again(
    complete: Path, data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_two_steps(complete)
    figures = ["crops.png", "features.png", "masks.png", "neighbours.png"]
    assert sorted(path.name for path in (complete / "figures").iterdir()) == figures
    kept = [
        complete / "checkpoints" / "step_00000002" / "model.safetensors",
        complete / "summary.json",
        complete / "metrics.jsonl",
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    capsys.readouterr()
    assert main(command(QUICKSTART, data_path, complete.parent, "training.max_steps=2")) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    said = capsys.readouterr().out
    assert "k-NN, trained encoder" in said
    assert "evaluating" not in said
    assert "continues with other settings (evaluation.knn_k" not in said
    assert main(command(QUICKSTART, data_path, complete.parent, "training.max_steps=2", "evaluation.knn_k=3")) == 0
    said = capsys.readouterr().out
    assert "evaluating" in said
    assert "continues with other settings (evaluation.knn_k: 20 -> 3)" in said


def test_a_folder_of_another_run_is_not_continued(complete: Path, data_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(QUICKSTART, data_path, complete.parent, "training.max_steps=2", "masking.num_masks=2")) == 2
    assert "masking.num_masks: 4 -> 2" in capsys.readouterr().err


def test_a_second_run_in_the_folder_is_refused_in_one_line_and_changes_nothing(
    complete: Path, data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.name != ".lock"}
    with exclusive(complete, "go"):
        for resume in ("auto", "none"):
            assert main(command(QUICKSTART, data_path, complete.parent, f"checkpoint.resume={resume}")) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"train: {complete}: in use by process {os.getpid()} on ")
            assert error.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.name != ".lock"}


def test_the_branch_that_was_resumed_continues_and_nothing_starts_over_unasked(
    complete: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(complete, tmp_path / "quickstart")
    checkpoints = run / "checkpoints"

    def steps() -> list[str]:
        return sorted(path.name[-1] for path in checkpoints.glob("step_*"))

    settings = ["training.max_steps=4", "checkpoint.save_frequency=1", "checkpoint.keep_last_n=2"]
    assert main(command(QUICKSTART, data_path, tmp_path, *settings, "checkpoint.save_frequency=2")) == 0
    assert steps() == ["2", "4"]
    again = command(
        QUICKSTART, data_path, tmp_path, *settings, f"checkpoint.resume={checkpoints / 'step_00000002'}", "training.lr=1e-4"
    )
    capsys.readouterr()
    assert main(again) == 0
    assert "step_00000004: left for another branch, moved to abandoned-1" in capsys.readouterr().out
    assert steps() == ["3", "4"]
    kept = load_file(checkpoints / "abandoned-1" / "step_00000004" / "model.safetensors")
    now = load_file(checkpoints / "step_00000004" / "model.safetensors")
    assert not all(torch.equal(kept[name], now[name]) for name in kept)
    assert (checkpoints / "abandoned-1" / "metrics.jsonl").exists()

    for path in checkpoints.glob("step_*"):
        (path / "state.json").write_text("{}")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(command(QUICKSTART, data_path, tmp_path, *settings)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"train: {checkpoints}: every checkpoint is damaged")
    assert steps() == ["3", "4"]
    assert (run / "metrics.jsonl").read_bytes() == before

    assert main(command(QUICKSTART, data_path, tmp_path, *settings, "checkpoint.resume=none")) == 0
    assert "the earlier run there was moved to old-1; this one starts at step 0" in capsys.readouterr().out
    assert (run / "old-1" / "metrics.jsonl").read_bytes() == before
    assert (run / "old-1" / "checkpoints" / "step_00000003").is_dir()
    assert steps() == ["3", "4"]


def test_images_without_labels_get_neighbours_and_rankme_and_no_accuracies(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = without_labels(data_path, tmp_path / "bare")
    changes = ["training.max_steps=2", "logging.pictures=true"]
    assert main(command(QUICKSTART, bare, tmp_path, *changes)) == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert (summary["knn"], summary["linear"], summary["validation_images"]) == (None, None, 24)
    assert summary["rankme"] > 1
    assert summary["placement"]["trained"] > summary["placement"]["chance"]
    assert "Do its tokens find their place?" in (tmp_path / "quickstart" / "report.html").read_text()
    assert (tmp_path / "quickstart" / "figures" / "neighbours.png").exists()
    said = capsys.readouterr().out
    assert said.count("103 of 103 samples without labels") == 1
    assert "RankMe of the trained features" in said
    assert "placement, random initialisation" in said
    assert "k-NN" not in said


@pytest.mark.parametrize("strategy", ["global_with_local_context", "cross_crop_prediction"])
def test_every_strategy_trains(strategy: str, data_path: Path, tmp_path: Path) -> None:
    changes = [f"masking.strategy={strategy}", "logging.log_frequency=2"]
    path, *overrides = command(QUICKSTART, data_path, tmp_path, *changes)
    trainer = Trainer(load_config(Path(path), overrides))
    assert trainer.train_step() == {}
    line = trainer.train_step()
    assert min(line["level_0"], line["level_1"], line["level_2"]) > 0
    assert list(tmp_path.iterdir()) == []


def interrupt_at_step(run: Path, step: int, number: signal.Signals) -> threading.Thread:
    """Send this process a signal as soon as the run's log has reached `step`."""

    def watch() -> None:
        log = run / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < step:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# Apart, so that no signal finds its step already logged and comes before the run is ready for it.
STOPS = [(1, 15, signal.SIGTERM), (35, 50, signal.SIGUSR1), (70, 80, signal.SIGINT)]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_stopped_at_random_steps_and_resumed_ends_with_the_same_weights_bit_for_bit(
    count: int, data_path: Path, tmp_path: Path
) -> None:
    settings = [f"training.epochs={5 if count == 2 else 8}", "checkpoint.save_frequency=7", "logging.log_frequency=1"]
    whole, parts = (command(QUICKSTART, data_path, tmp_path, *settings, f"logging.run_name={n}") for n in ("whole", "parts"))
    assert main(whole) == 0
    for first, last, number in STOPS[:count]:
        step = random.randint(first, last)
        watcher = interrupt_at_step(tmp_path / "parts", step, number)
        assert main(parts) == 75, step
        watcher.join()
    assert json.loads((tmp_path / "parts" / "heartbeat.json").read_text())["status"] == "stopped"
    assert main(parts) == 0
    newest = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "parts")]
    assert newest[0].name == newest[1].name
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(path / file) for path in newest)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[(line["step"], line["loss"]) for line in map(json.loads, part) if "loss" in line] for part in lines]
    assert losses[0] == losses[1]


@contextmanager
def sizes_limited(most: int) -> Iterator[None]:
    """While open, no file of this process may grow beyond `most` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_a_checkpoint_is_reported_and_training_continues_with_the_last_good_one_intact(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(QUICKSTART, data_path, tmp_path, "training.max_steps=4", "checkpoint.save_frequency=2")
    assert main(arguments) == 0
    more = [argument.replace("max_steps=4", "max_steps=7") for argument in arguments]
    with sizes_limited(60_000):
        assert main(more) == 4
    said = capsys.readouterr().out
    assert "step 7 are NOT saved" in said or "the summary could not be written" in said
    for step in (6, 7):
        assert f"step {step} could not be saved" in said
    assert said.count("step_00000004") >= 2
    checkpoints = tmp_path / "quickstart" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004"]
    verify_checkpoint(checkpoints / "step_00000004")
    assert main(more) == 0
    assert (checkpoints / "step_00000007").is_dir()


def test_a_log_that_the_disk_refuses_is_reported_once_and_what_is_there_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with closing(MetricsLog(tmp_path, True, 0)) as log:
        log.write(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with sizes_limited(len(before)), closing(MetricsLog(tmp_path, True, 1)) as log:
        for step in range(2, 300):
            log.write(step, {"loss": 1.0})
    (message,) = caplog.messages
    assert str(tmp_path) in message
    assert capsys.readouterr().err == ""
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)


def test_a_place_that_cannot_be_written_is_one_line_and_exit_code_2(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    arguments = command(QUICKSTART, data_path, tmp_path / "taken")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "taken/quickstart: cannot be written (Not a directory)" in error


def test_under_srun_without_torchrun_one_line_says_what_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert main([str(QUICKSTART), f"logging.run_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train: SLURM_NTASKS=4, but without torchrun")
    assert "sbatch docker/slurm.sbatch" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_data_one_line_says_what_is_missing_and_which_command_makes_it(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "train.run", str(ROOT / "configs" / "multicrop_training.yaml")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no shards (*.tar) here" in result.stderr
    assert "python tools/make_shards.py convert" in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder=resnet18", "encoder 'resnet18': not a timm Eva model"),
        pytest.param(
            "device=gpu",
            "device: gpu, but torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("data.crop_device=gpu", "crop_device gpu needs device gpu"),
        ("data.multicrop.global_crop_size=33", "crop size 33: not a multiple of the patch size 8"),
        ("model.predictor_heads=7", "the width of a head must be a multiple of 4"),
        ("training.warmup_epochs=300", "so lr would never reach its peak"),
        ("masking.context_ratio=0.01", "0 context and 8 query tokens of 16"),
        ("model.levels=[{layer: 5, stride: 1, weight: 1.0}]", "the encoder has 2 blocks"),
        ("logging.wandb=true", "logging.wandb: it gets what TensorBoard does"),
        ("checkpoint.resume=runs/nowhere", "checkpoint.resume: runs/nowhere"),
        ("data.batch_size=200", "103 samples are fewer than one global batch of 200"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_exit_code_2(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(command(QUICKSTART, data_path, tmp_path, override)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


WANDB = """
from types import SimpleNamespace

calls = []

def finish(exit_code):
    calls.append(exit_code)
    raise OSError("no network")

def init(**options):
    if len(calls) > 3:
        raise RuntimeError("not logged in")
    calls.append(options)
    return SimpleNamespace(id="abc", finish=finish)
"""


def test_a_run_has_one_name_in_weights_and_biases_whose_errors_end_no_training(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a stand-in for the package, which the lock does not have."""

    def run(steps: int, *changes: str) -> int:
        changes = (f"training.max_steps={steps}", "logging.tensorboard=true", "logging.wandb=true", *changes)
        return main(command(QUICKSTART, data_path, tmp_path, *changes))

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(1) == 2
    assert "logging.wandb: the package wandb is not installed" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    assert run(1) == run(2) == 0
    assert "Weights & Biases failed (no network); training continues" in capsys.readouterr().out
    first, code, again, _ = sys.modules["wandb"].calls
    assert (first["id"], first["name"], first["config"]["seed"], code) == (None, "quickstart", 0, 0)
    assert (again["id"], again["resume"], again["sync_tensorboard"]) == ("abc", "allow", True)
    assert run(2, "checkpoint.resume=none") == 0
    assert "Weights & Biases failed (not logged in); training continues" in capsys.readouterr().out
    assert not (tmp_path / "quickstart" / "wandb_id").exists()


def test_a_run_of_an_older_version_is_continued_and_read_without_the_settings_that_are_gone(
    complete: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "quickstart"
    shutil.copytree(complete, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"cache_size_gb": None, "hw_decoder_load": "auto"}
    settings["loss"]["sigreg_knots"] = 17
    settings["logging"]["wandb"] = {"enabled": False, "project": "hjepa"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    gone = "left out, as this version has no such settings: data.cache_size_gb, data.hw_decoder_load, loss.sigreg_knots"
    capsys.readouterr()

    assert load_config(run / "config.yaml") == load_config(complete / "config.yaml", [f"logging.run_dir={complete.parent}"])
    assert main([str(run / "config.yaml"), f"logging.run_dir={tmp_path}", "training.max_steps=3"]) == 0
    assert capsys.readouterr().out.count(gone) == 1
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(command(QUICKSTART, data_path, tmp_path, "training.max_steps=4")) == 0
    assert "step_00000003 (step 3 of 4)" in capsys.readouterr().out

    mine = tmp_path / "config.yaml"  # not in a run's folder
    mine.write_text(yaml.safe_dump(settings))
    assert main([str(mine), "logging.run_name=mine", "--print-config"]) == 2
    assert capsys.readouterr().err.count("unknown key") == 3
