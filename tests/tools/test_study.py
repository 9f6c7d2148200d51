"""The study: its plan, the figures of one training, and the tables made of them."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.train.evaluation.test_dense import coloured_scenes
from tests.train.test_run import ROOT
from tools import study
from tools.studies.grid import BASE, CONTINUING, EXPERIMENTS, PEERS, VARIANTS, Base, plan_sections, plan_trials
from tools.studies.tables import mean_and_interval, write_tables
from tools.studies.training import calibrate, run_baselines, run_trial, trial_config
from train.config.load import load_config


# The quickstart predicts tokens and has no summary, so that two variants are its base.
@pytest.mark.parametrize(
    ("config", "same"),
    [
        ("quickstart", {BASE, "global_only", "tokens 1"}),
        ("study_fashion_mnist", {BASE}),
        ("study_emoji", {BASE}),
        ("study_scenes", {BASE}),
    ],
)
def test_every_variant_is_a_valid_config_that_differs_from_all_others(config: str, same: set[str]) -> None:
    base = Base(str(ROOT / "configs" / f"{config}.yaml"), ("training.lr=1e-3",))
    variants = [trial_config(base, name, 3, 7) for name in VARIANTS]
    texts = {name: variant.to_yaml() for name, variant in zip(VARIANTS, variants, strict=True)}
    assert {name for name, text in texts.items() if text == texts[BASE]} == same
    assert len(set(texts.values())) == len(VARIANTS) - len(same) + 1
    assert {variant.seed for variant in variants} == {3}
    assert {variant.training.max_steps for variant in variants} == {7}
    assert variants[list(VARIANTS).index("1+0")].data.crop_counts == (1, 0)
    assert variants[list(VARIANTS).index(BASE)].data.crop_counts == (2, 6)
    assert not any("," in name for name in (*VARIANTS, *PEERS, *CONTINUING))  # --variants separates them so
    peers = {name: trial_config(base, name, 3, 7) for name in PEERS}
    assert {variant.training.lr for variant in [*variants, *peers.values()]} == {1e-3}
    assert trial_config(Base(base.config), "ijepa", 3, 7).training.lr == 4e-3
    assert {name for name, peer in peers.items() if peer.loss.prediction_weight > 0} == {"ijepa"}
    assert peers["ijepa"].data.crop_counts == (1, 0)


def test_each_training_is_planned_once_seed_by_seed_and_crops_at_equal_time_come_first() -> None:
    planned = plan_trials(plan_sections(), [0, 1, 2])
    assert len(planned) == len(set(planned))
    assert [trial.variant for trial in planned[:3]] == ["1+0", "2+0", BASE]
    assert [trial.seed for trial in planned] == sorted(trial.seed for trial in planned)
    assert {trial.variant for trial in planned} == {variant for _, variants, _ in EXPERIMENTS for variant in variants}


def test_one_training_measures_time_memory_and_accuracy_of_its_variant(base: Path) -> None:
    masks = str(coloured_scenes(base.parent / "masks"))
    rows = {name: run_trial(Base(str(base), masks=masks), name, 0, 2)[-1] for name in ("1+0", "2+6")}
    for row in rows.values():
        assert set(row) | {"variant", "equal", "seed", "share", "unmixed"} == set(study.FIELDS)
        assert 0 < row["dense_knn"] <= 100
        assert (row["steps"], row["images"]) == (2, 16)
        assert row["cpu_s"] >= 0
        assert 0 <= row["knn"] <= 100
    again = run_trial(Base(str(base)), "2+6", 0, 2)[-1]
    assert [again[key] for key in ("knn", "linear", "rankme")] == [rows["2+6"][key] for key in ("knn", "linear", "rankme")]
    assert set(again) == set(rows["2+6"]) - {"dense_knn", "dense_linear"}
    baselines = run_baselines(Base(str(base), masks=masks), 0)
    assert [name for name, row in baselines.items() if "dense_knn" in row] == ["raw pixels", "random initialisation"]
    assert set(baselines) == {"raw pixels", "colour histogram", "random initialisation"}


def test_the_interval_is_students() -> None:
    # Three values of standard deviation 1: 4.303 / sqrt(3).
    assert mean_and_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))
    assert mean_and_interval([5.0]) == (5.0, None)


def made_up_rows() -> list[dict[str, str]]:
    rows = [{**dict.fromkeys((*study.FIELDS, "step_mib"), ""), "variant": "raw pixels", "seed": "0", "knn": "50", "linear": "50"}]
    for variant, knn, rate, memory in (("1+0", 60, 1400, 10), ("2+0", 62, 1200, 15), ("2+6", 64, 1000, 16)):
        for seed, shift in enumerate((-1, 0, 1)):
            row = {
                "variant": variant, "equal": "time", "seed": seed, "knn": knn + shift, "linear": knn + 10, "rankme": 5,
                "steps": 10, "images": 320, "cpu_s": 10, "images_per_cpu_s": rate, "peak_mib": 100,
                "step_mib": memory,
            }  # fmt: skip
            rows.append({key: str(value) for key, value in row.items()})
    return rows


def test_the_tables_hold_means_and_intervals(tmp_path: Path) -> None:
    rows = made_up_rows()
    write_tables(tmp_path / "made_up", "a command", [], BASE, rows, {BASE: 10}, 10.0)
    text = (tmp_path / "made_up.md").read_text()
    assert "dense" not in text  # nobody measured it
    assert "| 2+6 | 3 | 64.0 ± 2.5 | 74.0 ± 0.0 | 320 | 10.0 | 1,000 | 16.0 | 100 |" in text
    assert "| raw pixels | 1 | 50.0 | 50.0 |" in text
    assert (tmp_path / "made_up.png").stat().st_size > 5_000


def test_a_study_of_another_budget_is_not_continued(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny_calibration.json").write_text('{"budget_s": 5.0, "step_cpu_ms": {}, "steps": {}}')
    assert study.main([str(base), "--out", str(tmp_path), "--budget", "6"]) == 2
    assert "budget_s: 5.0 -> 6.0" in capsys.readouterr().err
    assert study.main([str(tmp_path / "none.yaml"), "--out", str(tmp_path)]) == 2


def test_a_study_of_other_settings_is_not_continued(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study of another path for its config or its images is continued, since both can be moved."""
    settings = load_config(base).resolved
    ready = {"budget_s": 6.0, "points": 1, "overrides": [], "step_cpu_ms": {}, "steps": dict.fromkeys(VARIANTS, 1)}
    path = tmp_path / "tiny_calibration.json"
    path.write_text(json.dumps(ready | {"settings": {**settings, "data": {**settings["data"], "data_path": "moved"}}}))
    assert calibrate(path, Base(str(base)), 6.0, 1, list(VARIANTS)) == ready["steps"]
    path.write_text(json.dumps(ready | {"settings": {**settings, "loss": {**settings["loss"], "view_weight": 7.0}}}))
    assert study.main([str(base), "--out", str(tmp_path), "--budget", "6"]) == 2
    assert f"another study (loss.view_weight: 7.0 -> {settings['loss']['view_weight']})" in capsys.readouterr().err
    assert not (tmp_path / "tiny.csv").exists()


def test_a_table_without_its_first_line_is_not_continued(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = {"budget_s": 6.0, "points": 1, "overrides": [], "step_cpu_ms": {}, "steps": dict.fromkeys(VARIANTS, 1)}
    (tmp_path / "tiny_calibration.json").write_text(json.dumps(ready))
    line = "2+6,time,0,7,56,0.5\n"
    (tmp_path / "tiny.csv").write_text(line)
    assert study.main([str(base), "--out", str(tmp_path), "--budget", "6"]) == 2
    assert f"{tmp_path / 'tiny.csv'}: its first line lacks the columns" in capsys.readouterr().err
    assert (tmp_path / "tiny.csv").read_text() == line


def test_rows_keep_the_columns_of_an_older_table(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("variant,equal,seed,step_mib,knn\n2+6,time,0,16,64\n")
    study.append_rows(path, study.FIELDS, [{"variant": "2+6", "equal": "time", "seed": 1, "knn": 65, "linear": 70}])
    assert path.read_text().splitlines()[-1] == "2+6,time,1,,65"


ARENA = ["--variants", "lejepa,2+0,one level,ijepa,dino,supervised", "--budget", "150", "--points", "3", "--equal", "time"]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("quickstart", ["--budget", "40"]),
        ("study_fashion_mnist", ["--budget", "40"]),
        ("study_fashion_mnist", ARENA),
        ("study_emoji", ARENA),
    ],
)
def test_the_finished_studies_only_write_their_tables_again(config: str, options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "results"
    shutil.copytree(ROOT / "results", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert study.main([f"configs/{config}.yaml", *options, "--out", str(out)]) == 0
    for path in (ROOT / "results").glob(f"{config}*"):
        if path.suffix != ".png":  # whose bytes depend on matplotlib's version
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_variant_that_comes_later_is_calibrated_against_the_known_step_of_the_base(base: Path, tmp_path: Path) -> None:
    path, known = tmp_path / "calibration.json", {"step_cpu_ms": {BASE: 100.0}, "steps": {BASE: 7}}
    path.write_text(json.dumps({"budget_s": 0.7, "points": 1, "overrides": [], **known}))
    steps = calibrate(path, Base(str(base)), 0.7, 1, [BASE, "2+0"])
    record = json.loads(path.read_text())
    assert steps == record["steps"] == {BASE: 7, "2+0": round(700 / record["step_cpu_ms"]["2+0"])}
    assert 10 < record["step_cpu_ms"]["2+0"] < 1000
    assert calibrate(path, Base(str(base)), 0.7, 1, [BASE, "2+0"]) == steps


@pytest.mark.slow
def test_a_study_runs_to_its_tables_and_again_trains_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(base), "--out", str(tmp_path), "--budget", "0.1", "--seeds", "0"]
    planned = plan_trials(plan_sections(), [0])
    assert study.main(arguments) == 0
    assert f"tiny {len(planned)}/{len(planned)}: " in capsys.readouterr().out
    with (tmp_path / "tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == [
        *("raw pixels", "colour histogram", "random initialisation"),
        *(trial.variant for trial in planned),
    ]
    before = (tmp_path / "tiny.csv").read_text()
    (tmp_path / "tiny.md").unlink()
    assert study.main(arguments) == 0
    assert (tmp_path / "tiny.csv").read_text() == before
    assert (tmp_path / "tiny.md").exists()
    assert capsys.readouterr().out == ""
