"""Files next to shards and in run folders come from anybody: whatever they hold, it is one line or has no effect."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.files import expand_path, read_whole
from pipeline.quarantine import Quarantine
from pipeline.shards.index import open_index, save_index
from pipeline.shards.index_file import INDEX_FILES, SAMPLES_NAME, _checksum, index_files
from pipeline.shards.manifest import check_class_count, read_manifest
from tests.pipeline.shards.conftest import write_manifest
from tests.train.test_run import QUICKSTART, command
from tools import compare_runs, doctor, make_shards
from train import evaluate
from train.checkpoint import MANIFEST, _manifest, load_checkpoint
from train.config.load import load_config
from train.evaluation.online import read_baselines
from train.output.folder import read_settings
from train.output.log import MetricsLog, read_metrics
from train.run import main

HOSTILE = (
    None, True, -1, 0, 1.5, 10**30, -(10**400), 1e308, float("nan"), float("inf"), "", "\x1b[2J", "\udcff", "a" * 300, [], {},
    [[]], {"": None}, {"step": 1}, [0] * 50,
)  # fmt: skip
RAW = (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"[1]", b"1" * 5000, b'{"a":' * 2000 + b"1" + b"}" * 2000)


def changed(content: Any, rng: random.Random) -> Any:
    """Return the content with one value, somewhere inside, replaced, removed or doubled."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.15:
        return rng.choice(HOSTILE)
    copy = content.copy()
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    if rng.random() < 0.15:
        del copy[key]
    elif isinstance(copy, dict) and rng.random() < 0.1:
        copy[rng.choice(["step", "\x1b[2J", "x", "1"])] = copy[key]
    else:
        copy[key] = changed(copy[key], rng)
    return copy


def hostile_contents(text: str, trials: int) -> list[bytes]:
    """Return contents for a file that soundly holds JSON, or lines of JSON."""
    rng, contents = random.Random(0), list(RAW)
    for _ in range(trials):
        lines = text.splitlines() if not text.startswith("{\n") else [text]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(changed(json.loads(lines[number]), rng))
        contents.append("\n".join(lines).encode("utf-8", "surrogatepass"))
    return contents


@pytest.fixture(scope="module")
def shards(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(data_path / "train", tmp_path_factory.mktemp("side") / "train"))
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)
    write_manifest(folder, index)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"classes": ["a", "b"], "num_samples": 103}))
    return folder


@pytest.fixture(scope="module")
def run(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main(command(QUICKSTART, data_path, runs, "training.max_steps=2", "logging.log_frequency=1")) == 0
    return runs / "quickstart"


def open_shards(path: Path) -> None:
    index = open_index(path.parent)
    if (manifest := read_manifest(path.parent)) is not None:
        check_class_count(path.parent, index.samples["label"], manifest)


def open_quarantine(path: Path) -> None:
    shutil.copytree(path.parent, copy := path.parent / "copy", ignore=lambda *_: ["copy"])
    try:
        assert set(Quarantine(open_index(copy), path).reasons) <= set(range(103))
    finally:
        shutil.rmtree(copy)


def compare(path: Path) -> None:
    if compare_runs.main([str(path.parent), "--html", str(path.parent.parent / "page.html")]) == 2:
        raise ValueError


def open_metrics(path: Path) -> None:
    content = path.read_bytes()
    compare(path)
    with closing(MetricsLog(path.parent, False, 1)):
        assert all(line["step"] <= 1 for line in read_metrics(path.parent))
    path.write_bytes(content)


def open_state(path: Path) -> None:
    (path.parent / MANIFEST).write_text(_manifest(path.parent))  # whoever forges a checkpoint forges its sums
    state = load_checkpoint(path.parent, nn.Linear(0, 0, bias=False))
    assert 0 <= state["step"] < 10**8


READERS: dict[str, Callable[[Path], object]] = {
    "shards/index.json": open_shards,
    "shards/manifest.json": open_shards,
    "shards/quarantine.jsonl": open_quarantine,
    "run/summary.json": compare,
    "run/metrics.jsonl": open_metrics,
    "run/baselines.json": lambda path: read_baselines(path, {}),
    "run/checkpoints/step_00000002/state.json": open_state,
}


def try_all(file: str, trials: int, shards: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place, _, name = file.partition("/")
    copy = Path(shutil.copytree(shards if place == "shards" else run, tmp_path / "copy"))
    path = copy / name
    if place == "shards":
        entry = {"row": 41, "shard": "photos-000001.tar", "key": "x", "reason": "r", "data": open_index(copy).digest}
        (copy / "quarantine.jsonl").write_text(f"{json.dumps(entry)}\n" * 3)
    for step in (copy / "checkpoints").glob("step_*"):
        save_file({"weight": torch.zeros(0, 0)}, step / "model.safetensors")
    sound = path.read_text()
    for content in hostile_contents(sound, trials):
        path.write_bytes(content)
        capfd.readouterr()
        try:
            READERS[file](path)
        except (ValueError, OSError) as error:
            said = str(error) or capfd.readouterr().err.strip()
            assert said.count("\n") == 0, (content[:200], said)
            assert len(said) < 2000, said
    path.write_text(sound)
    READERS[file](path)


@pytest.mark.parametrize("file", READERS)
def test_any_content_of_a_side_file_is_one_line_or_has_no_effect(
    file: str, shards: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try_all(file, 25, shards, run, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("file", READERS)
def test_a_thousand_contents_of_a_side_file_are_one_line_or_have_no_effect(
    file: str, shards: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try_all(file, 1000, shards, run, tmp_path, capfd)


def test_settings_that_expand_without_end_are_one_line(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path = tmp_path / "config.yaml"
    for content in (bomb, "x: " + "[" * 5000, "!!python/object/apply:os.system ['true']", "k: 1\n" * 100_000, "", "\xff"):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path}: damaged, no settings") as caught:
            read_settings(path)
        assert "\n" not in str(caught.value)


INDEX_ROWS: dict[str, dict[str, int]] = {
    "beyond its tar": {"size": 1 << 60},
    "that overflow": {"offset": 512, "size": (1 << 63) - 1},
    "before its tar": {"offset": -512},
    "without pixels": {"width": 0},
    "with an impossible label": {"label": -5},
    "of another shard": {"shard": 2},
}


@pytest.mark.parametrize("rows", INDEX_ROWS)
def test_one_hostile_row_of_an_index_is_noticed(shards: Path, tmp_path: Path, rows: str) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "train"))
    index = open_index(folder)
    samples = index.samples.copy()
    for column, value in INDEX_ROWS[rows].items():
        samples[column][20] = value
    for name, content in index_files(dict(zip(index.shards, index.counts.tolist(), strict=True)), samples).items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{SAMPLES_NAME}: damaged"):
        open_index(folder)


def test_objects_and_absurd_shapes_in_an_index_are_not_loaded(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "train"))
    content = (folder / SAMPLES_NAME).read_bytes()
    for before, after in ((b"(103,)", b"(1<<9)"), (b"'<i4'", b"'|O' "), (b"(103,), }       ", b"(1234567890123,)")):
        assert before in content
        changed = content.replace(before, after, 1)
        counts = {name: int(count) for name, count in json.loads((folder / INDEX_FILES[1]).read_text())["shards"].items()}
        digest = _checksum(counts, changed[:-32])
        (folder / SAMPLES_NAME).write_bytes(changed[:-32] + digest)
        (folder / INDEX_FILES[1]).write_text(json.dumps({"checksum": digest.hex(), "shards": counts}))
        with pytest.raises(ValueError, match=rf"{SAMPLES_NAME}: ") as caught:
            open_index(folder)
        assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(open_index(shards).counts, [41, 40, 22])


def test_a_file_longer_than_it_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b"1234")
    assert read_whole(path, 4) == b"1234"
    with pytest.raises(ValueError, match=r"longer than the 3 bytes"):
        read_whole(path, 3)


@pytest.mark.parametrize("name", ["metrics.jsonl", "figures", "checkpoints", "report.html"])
def test_a_run_writes_through_no_link_in_its_folder(
    name: str, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "quickstart"
    victim.mkdir()
    folder.mkdir()
    (folder / name).symlink_to(victim)
    assert main(command(QUICKSTART, data_path, tmp_path, "training.max_steps=1")) == 2
    assert f"{folder / name}: a link, and a run writes only into its own folder" in capsys.readouterr().err
    assert not list(victim.iterdir())


PLAIN_URLS = ("s3://b/a@b", "https://host:8080/a@2x/b", "hf://datasets/u/n@v1:x", "a@b:c/d@e", "https://h/x:y")
SECRET_URLS = (
    "s3://AKIA:hush/hush@photos/set",
    "https://me:hush@example.org/set",
    "http://hush@example.org",
    "gs://$SECRET@b/set",
)


def test_a_place_with_an_at_sign_and_no_password_stays() -> None:
    assert [expand_path(url) for url in PLAIN_URLS] == list(PLAIN_URLS)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_password_in_a_url_is_refused_and_never_repeated(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hush:hush")
    with pytest.raises(ValueError, match="user name or password") as caught:
        expand_path(url)
    assert "hush" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.data_path: \w+://\.\.\.@: a URL with a user name or password"):
        load_config(QUICKSTART, [f"data.data_path={url}"])
    commands: dict[str, Callable[[list[str]], int]] = {
        "doctor": lambda args: doctor.main(["--data", url]),
        "train": lambda args: main(command(QUICKSTART, Path("x"), tmp_path, *args)),
        "convert": lambda args: make_shards.main(["convert", str(tmp_path), "--out", url]),
        "source": lambda args: make_shards.main(["convert", url, "--out", str(tmp_path / "out")]),
        "index": lambda args: make_shards.main(["index", url]),
        "evaluate": lambda args: evaluate.main([str(tmp_path), "--data", url]),
    }
    for name, run_command in commands.items():
        try:
            code = run_command([f"data.data_path={url}"])
        except SystemExit as exit_:  # of argparse
            code = exit_.code
        assert code == 2, name
    said = capfd.readouterr()
    assert "hush" not in said.out + said.err, said
    assert not any("hush" in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
