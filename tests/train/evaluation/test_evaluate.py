"""The command that measures a run, on real shards."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import photographs, write_shards
from tests.train.test_run import ROOT, command
from tools.make_shards import main as make_shards
from train.evaluate import main as evaluate
from train.run import main as train

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def run(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings = ["training.epochs=2", "evaluation.eval_frequency=1", "logging.run_name=short", "logging.log_frequency=1"]
    settings.append("logging.pictures=true")
    assert train(command(QUICKSTART, data_path, folder, *settings)) == 0
    return folder / "short"


def test_the_log_holds_knn_and_linear_probe_of_each_evaluation_and_the_report_every_picture(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "knn" in line]
    assert [line["step"] for line in measured] == [12, 24]
    assert measured[-1]["knn"] == json.loads((run / "summary.json").read_text())["knn"]["trained"]
    assert 0 <= measured[0]["linear"] <= 100
    report = (run / "report.html").read_text()
    for name in ("crops", "masks", "features", "neighbours"):
        picture = (run / "figures" / f"{name}.png").read_bytes()
        assert len(picture) > 5_000
        assert base64.b64encode(picture).decode() in report


def test_every_probe_has_pixels_and_random_initialisation_next_to_it_and_twice_the_same_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--probe", "knn", "linear", "--json"]
    assert evaluate([*arguments, str(tmp_path / "one.json")]) == 0
    printed = capsys.readouterr().out
    assert evaluate([str(run / "checkpoints" / "step_00000024"), *arguments[1:], str(tmp_path / "two.json")]) == 0
    report, again = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert report["figures"] == again["figures"]
    assert (report["step"], report["images"]) == (24, [103, 24])
    for probe in ("knn", "linear"):
        rows = {figure["features"] for figure in report["figures"] if figure["probe"] == probe}
        assert {"pixels", "random_init", "trained"} <= rows, probe
    settings = {figure["setting"] for figure in report["figures"] if figure["probe"] == "knn"}
    assert settings == {"k=10", "k=20", "k=100"}  # of 103 training images, there are no 200 neighbours
    assert {f"trained, level {rung}" for rung in range(3)} <= {figure["features"] for figure in report["figures"]}
    summary = json.loads((run / "summary.json").read_text())
    placed = {figure["features"]: figure["accuracy"] for figure in report["figures"] if figure["probe"] == "placement"}
    for name in ("chance", "pixels", "random_init", "trained"):
        assert placed[name] == pytest.approx(summary["placement"][name])
    assert placed["trained, level 1"] == pytest.approx(summary["placement"]["level_1"])
    assert "| placement | raw pixels | 24 pairs of crops |" in printed
    knn = summary["knn"]
    trained = [f for f in report["figures"] if (f["features"], f["setting"]) == ("trained", "k=20")]
    assert trained[0]["accuracy"] == pytest.approx(knn["trained"])
    assert "| knn | trained | k=10 / k=20 / k=100 |" in printed


def test_other_shards_and_fewer_samples(run: Path, data_path: Path, tmp_path: Path) -> None:
    shutil.copytree(data_path, tmp_path / "moved")
    out = tmp_path / "few.json"
    arguments = ["--data", str(tmp_path / "moved"), "--max-samples", "50", "--probe", "knn", "--json", str(out)]
    assert evaluate([str(run), *arguments]) == 0
    report = json.loads(out.read_text())
    assert report["images"] == [50, 24]
    assert report["data"][0] == str(tmp_path / "moved" / "train")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert evaluate(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate: ")]
    assert len(errors) == 1
    return errors[0]


def test_what_cannot_be_measured_is_one_clean_line(
    run: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "neither a run's folder nor a checkpoint" in refusal([str(tmp_path / "nothing")], capsys)
    assert "no shards (*.tar) here" in refusal([str(run), "--data", str(tmp_path / "none")], capsys)
    assert "evaluation.max_samples" in refusal([str(run), "--max-samples", "0"], capsys)

    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "step_00000024", copy / "checkpoints" / "step_00000024")
    assert "name the checkpoint's settings with --config" in refusal([str(copy)], capsys)
    text = (run / "config.yaml").read_text().replace("embed_dim: 16", "embed_dim: 32")
    (copy / "config.yaml").write_text(text)
    assert "belongs to another architecture" in refusal([str(copy)], capsys)
    weights = copy / "checkpoints" / "step_00000024" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "no undamaged checkpoint here" in refusal([str(copy)], capsys)

    one_split = write_shards(tmp_path / "one_split", [12])
    assert "a single split; evaluation needs train/ and val/" in refusal([str(run), "--data", str(one_split)], capsys)


def test_shards_without_labels_are_measured_by_placement_only_and_a_line_says_so(
    run: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, picture in enumerate(photographs(12)):
        picture.save(photos / f"{number}.jpg")
    assert make_shards(["convert", str(photos), "--out", str(tmp_path / "bare"), "--val-ratio", "0.25"]) == 0
    out = tmp_path / "bare.json"
    assert evaluate([str(run), "--data", str(tmp_path / "bare"), "--json", str(out)]) == 0
    assert capsys.readouterr().err.count("only placement accuracy") == 1
    assert {figure["probe"] for figure in json.loads(out.read_text())["figures"]} == {"placement"}
