"""The front command, the spellings that all commands accept, sweeps and the list of runs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.test_run import QUICKSTART, ROOT, command
from tools.hjepa import COMMANDS
from tools.hjepa import main as hjepa
from tools.sweep import plan
from train.command import CommandParser
from train.config.load import load_config
from train.config.yaml12 import ConfigError
from train.run import parse_arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_every_word_prints_the_help_of_its_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hjepa([name, "--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_the_front_says_its_version_its_words_and_which_word_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert hjepa(["--version"]) == 0
    assert capsys.readouterr().out == "multicrop-hjepa 0.1.0\n"
    assert hjepa([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)
    assert hjepa(["tarin"]) == 2
    assert "'tarin' is no command; allowed: train, sweep" in capsys.readouterr().err


def test_flags_are_taken_with_hyphens_and_underscores() -> None:
    parser = CommandParser()
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--data_path")
    given = parser.parse_args(["--max_samples=3", "--data-path", "a-b_c"])
    assert (given.max_samples, given.data_path) == (3, "a-b_c")
    _, overrides, _ = parse_arguments(["c.yaml", "--batch-size", "4"])
    assert overrides == ["data.batch_size=4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.1"], "write training.lr=0.1"),
        (["--lr=0.1"], "write training.lr=0.1"),
        (["--training.lr=0.1"], "write training.lr=0.1"),
        (["--num-local-crops", "2"], "write data.multicrop.num_local_crops=2"),
    ],
)
def test_a_setting_written_as_a_flag_is_told_how_to_write_it(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([str(QUICKSTART), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_is_the_gpu_and_a_plus_is_not_needed() -> None:
    assert load_config(QUICKSTART, ["device=cuda"]).device == "gpu"
    with pytest.raises(ConfigError, match=r"write training.lr=0.1"):
        load_config(QUICKSTART, ["+training.lr=0.1"])


def test_a_sweep_has_a_run_for_each_combination(tmp_path: Path) -> None:
    runs = plan(QUICKSTART, ["training.lr=1e-3,2e-3", "seed=0,1", "model.levels=[{layer: -1, stride: 1, weight: 1.0}]"])
    assert list(runs) == ["lr_1e-3__seed_0", "lr_1e-3__seed_1", "lr_2e-3__seed_0", "lr_2e-3__seed_1"]
    loaded = [load_config(QUICKSTART, settings) for settings in runs.values()]
    assert [(each.training.lr, each.seed) for each in loaded] == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]
    assert {each.logging.run_dir for each in loaded} == {"runs/quickstart-sweep"}
    with pytest.raises(ValueError, match="no setting has several values"):
        plan(QUICKSTART, ["training.lr=1e-3"])


def statuses(runs: Path) -> list[str]:
    return [json.loads(path.read_text())["status"] for path in runs.glob("quickstart-sweep/*/heartbeat.json")]


@pytest.mark.slow
def test_a_sweep_trains_compares_and_is_listed(data_path: Path, tmp_path: Path) -> None:
    config, *settings = command(QUICKSTART, data_path, tmp_path / "runs", "training.max_steps=2", "training.warmup_epochs=0")
    settings = [setting for setting in settings if "encoder_kwargs" not in setting]
    settings.append("model.encoder_kwargs={img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}")
    words = [sys.executable, "-m", "tools.hjepa", "sweep", config, *settings, "seed=0,1", "--parallel", "2"]
    # A sweep that is stopped while both runs train has them save and end.
    changed = [word.replace("max_steps=2", "max_steps=100000").replace(str(tmp_path / "runs"), str(tmp_path)) for word in words]
    with subprocess.Popen(changed, cwd=ROOT) as stopped:
        while statuses(tmp_path) != ["training"] * 2:
            assert stopped.poll() is None
            time.sleep(0.1)
        stopped.terminate()
    while "training" in statuses(tmp_path):
        time.sleep(0.1)
    assert statuses(tmp_path) == ["stopped"] * 2
    for _ in range(2):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("complete") == 2
    assert (tmp_path / "runs" / "quickstart-sweep" / "comparison.html").exists()
    out = tmp_path / "runs.json"
    assert hjepa(["runs", str(tmp_path / "runs"), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["run"], row["status"], row["step"]) for row in rows] == [
        ("quickstart-sweep/seed_0", "complete", 2), ("quickstart-sweep/seed_1", "complete", 2),
    ]  # fmt: skip
    assert all(0 <= row["knn"] <= 100 for row in rows)
