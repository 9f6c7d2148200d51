"""Paths in settings and arguments are expanded as a shell does, in one place."""

from pathlib import Path

import pytest

from pipeline.files import expand_path
from tools.make_shards import main as make_shards
from train.config.load import load_config
from train.config.yaml12 import ConfigError
from train.run import main as train

KEYS = ("data.data_path", "data.cache_dir", "logging.run_dir", "checkpoint.resume")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SET", "a b")
    monkeypatch.delenv("UNSET", raising=False)
    (tmp_path / "$UNSET").mkdir()
    return tmp_path / "home"


def test_home_variables_and_file_urls_become_paths(home: Path) -> None:
    forms = {
        "~": f"{home}", "~/x": f"{home}/x", "$HOME/x": f"{home}/x", "x/${SET}/y": "x/a b/y", "$SET$SET": "a ba b",
        "x~": "x~", "x/~/y": "x/~/y", "$": "$", "5$ off": "5$ off", "$UNSET": "$UNSET", "file:///a%20b/c": "/a b/c",
        "s3://$SET/x": "s3://a b/x", "https://host/a%20b": "https://host/a%20b", "": "",
    }  # fmt: skip
    assert {text: expand_path(text) for text in forms} == forms
    for text in forms.values():
        assert expand_path(text) == text


@pytest.mark.parametrize("key", KEYS)
def test_every_path_of_a_config_is_expanded_and_written_out_so(key: str, home: Path) -> None:
    path = Path("run.yaml")
    path.write_text("data:\n  data_path: x\nlogging:\n  run_name: y\n")
    config = load_config(path, [f"{key}=~/$SET"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == f"{home}/a b"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    with pytest.raises(ConfigError, match=rf"{key}: \$UNSET/x: the variable \$UNSET is not set"):
        load_config(path, [f"{key}=$UNSET/x"])


def test_the_paths_of_commands_are_expanded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shards(["convert", "~/photos", "--out", "shards"]) == 2
    assert f"{home}/photos: no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        make_shards(["verify", "${UNSET}/x"])
    assert stop.value.code == 2
    assert "argument folder: ${UNSET}/x: the variable ${UNSET} is not set" in capsys.readouterr().err
    assert train(["~/run.yaml"]) == 2
    assert f"{home}/run.yaml: No such file" in capsys.readouterr().err
    assert train(["~nobody-here/run.yaml"]) == 2
    assert "no such user" in capsys.readouterr().err
    assert not Path("~").exists()
