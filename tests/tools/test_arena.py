"""The arena: other methods on our crops with our step, the bookkeeping of the budget, and its tables."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.train.test_run import ROOT
from tools import study
from tools.studies.grid import BASE, CONTINUED, CONTINUING, IMAGES, PEERS, TIME, UNTOUCHED, Base, plan_sections, plan_trials
from tools.studies.peers import Supervised
from tools.studies.tables import lead_lines, write_tables
from tools.studies.training import TimedTraining, measure_rows, run_trial, trial_config
from train.adapt.mix import SHARES
from train.config.load import load_config
from train.evaluation.features import pooled_features
from train.evaluation.placement import dense_features
from train.run import main as train

LIGHTLY = pytest.mark.skipif(find_spec("lightly") is None, reason="needs lightly: pip install -e '.[arena]'")
METHODS = [pytest.param(name, marks=LIGHTLY if name == "dino" else ()) for name in PEERS]


@pytest.mark.parametrize("variant", METHODS)
def test_a_peer_takes_two_steps_with_gradients_in_every_weight_of_the_encoder(base: Path, variant: str) -> None:
    training = TimedTraining(trial_config(Base(str(base)), variant, 0, 2), variant)
    model, losses = training.trainer.model, []
    model.register_forward_hook(lambda _, __, outputs: losses.append(outputs["loss"].item()))
    gradients: set[str] = set()
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(lambda p, name=name: gradients.add(name) if p.grad.abs().sum() > 0 else None)
    start = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    training.run_to(2)
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())
    assert {f"encoder.{name}" for name, _ in model.encoder.named_parameters()} <= gradients
    assert any(not torch.equal(value, start[name]) for name, value in model.encoder.state_dict().items())
    state = training.trainer.state
    assert (state.images, state.skipped_steps) == (16, 0)


@LIGHTLY
def test_dinos_loss_is_the_cross_entropy_of_all_pairs_of_different_views(base: Path) -> None:
    training = TimedTraining(trial_config(Base(str(base)), "dino", 0, 2), "dino")
    model, batch = training.trainer.model, next(iter(training.trainer.loader))
    outputs = [model.head(model.encoder([(crop, None)])[0].tokens.mean(dim=1)) for crop in batch.crops]
    taught = [model.target_head(model.target([(crop, None)])[0].tokens.mean(dim=1)) for crop in batch.crops[:2]]
    terms = [
        -((teacher / 0.04).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1).mean()
        for g, teacher in enumerate(taught)
        for v, student in enumerate(outputs)
        if g != v
    ]
    torch.testing.assert_close(model(batch.crops, batch.labels)["loss"], torch.stack(terms).mean())
    assert not any(value.requires_grad for value in model.target_head.parameters())


def test_supervised_is_the_mean_cross_entropy_of_every_view(base: Path) -> None:
    training = TimedTraining(trial_config(Base(str(base)), "supervised", 0, 2), "supervised")
    model, batch = training.trainer.model, next(iter(training.trainer.loader))
    assert isinstance(model, Supervised)
    terms = [
        torch.nn.functional.cross_entropy(model.head(model.encoder([(crop, None)])[0].tokens.mean(dim=1)), batch.labels)
        for crop in batch.crops
    ]
    torch.testing.assert_close(model(batch.crops, batch.labels)["loss"], torch.stack(terms).mean())


def test_evaluations_neither_count_nor_change_the_training(base: Path) -> None:
    start = Base(str(base))
    config = trial_config(start, BASE, 0, 4)
    training = TimedTraining(config, BASE)
    training.run_to(2)
    before = training.cpu_s
    target = training.trainer.model.target
    measure_rows(config, {"trained": pooled_features(target)}, {"trained": dense_features(target)})
    assert training.cpu_s == before > 0
    taken = training.step()
    assert training.cpu_s == pytest.approx(before + taken)
    often, once = run_trial(start, BASE, 0, 4, points=2), run_trial(start, BASE, 0, 4)
    assert [row["steps"] for row in often] == [2, 4]
    assert [row["images"] for row in often] == [16, 32]
    assert [row["cpu_s"] for row in often] == sorted(row["cpu_s"] for row in often)
    assert [often[-1][key] for key in ("knn", "linear", "rankme")] == [once[0][key] for key in ("knn", "linear", "rankme")]


def test_every_variant_is_compared_at_equal_time_and_at_equal_images_seed_by_seed() -> None:
    planned = plan_trials(plan_sections([BASE, "lejepa"], [TIME, IMAGES]), [0, 4])
    assert [(trial.variant, trial.equal, trial.seed) for trial in planned] == [
        *((BASE, "time", 0), ("lejepa", "time", 0), ("lejepa", "images", 0)),
        *((BASE, "time", 4), ("lejepa", "time", 4), ("lejepa", "images", 4)),
    ]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--variants", "lejepa,byol"], "--variants byol: unknown; known are 2+6, "),
        (["--variants", "lejepa", "--seeds", "0,x"], "--seeds 0,x: write different integers"),
        (["--variants", "lejepa", "--seeds", "1,1"], "--seeds 1,1: write different integers"),
        (["--variants", "lejepa", "--budget", "0"], "--budget 0: must be more than 0"),
        (["--variants", "lejepa", "--points", "0"], "--points 0: must be at least 1"),
        (["--variants", "continued"], "unknown; known are 2+6"),
        (["--points", "3"], "add --variants"),
        (["--weights", "runs/first"], "add --variants"),
        (["--variants", "lejepa", "--lead", "ijepa"], "--lead ijepa: is none of the compared variants, 2+6, lejepa"),
        (["data.batch_szie=3", "--variants", "lejepa"], "did you mean data.batch_size?"),
    ],
)
def test_options_that_make_no_sense_give_one_line(
    base: Path, tmp_path: Path, options: list[str], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert study.main([str(base), *options, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fact in line
    assert not out.exists()


@pytest.mark.skipif(find_spec("lightly") is not None, reason="lightly is installed")
def test_dino_without_lightly_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main([str(base), "--variants", "dino", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -e '.[arena]'" in line


@pytest.mark.parametrize(
    ("record", "fact"),
    [({"budget_s": 5.0, "points": 5}, "budget_s: 5.0 -> 6.0"), ({"budget_s": 6.0, "points": 2}, "points: 2 -> 5")],
)
def test_an_arena_made_for_other_options_is_not_continued(
    base: Path, tmp_path: Path, record: dict, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny_arena_calibration.json").write_text(json.dumps({**record, "step_cpu_ms": {}, "steps": {}}))
    assert study.main([str(base), "--variants", "lejepa", "--out", str(tmp_path), "--budget", "6"]) == 2
    assert fact in capsys.readouterr().err


def made_up(variant: str, equal: str, seed: int, knn: float, steps: int = 10) -> dict[str, str]:
    row = {"variant": variant, "equal": equal, "seed": seed, "knn": knn, "linear": knn + 1, "steps": steps}
    figures = {**row, "images": 32 * steps, "cpu_s": steps / 10}
    return {**dict.fromkeys(study.FIELDS, ""), **{key: str(value) for key, value in figures.items()}}


def test_leads_are_differences_of_the_same_seed(tmp_path: Path) -> None:
    scores = {(BASE, "time"): (64, 70, 76), ("lejepa", "time"): (62, 67, 74), ("lejepa", "images"): (60, 69)}
    rows = [made_up(*key, seed, knn) for key, values in scores.items() for seed, knn in enumerate(values)]
    text = "\n".join(lead_lines(rows, BASE, ["lejepa"], [TIME, IMAGES]))
    # 2, 3, 2: a standard deviation of 0.577, times 4.303 / sqrt(3).
    assert "| lejepa | +2.3 ± 1.4 | +2.3 ± 1.4 | +2.5 ± 19.1 | +2.5 ± 19.1 |" in text
    baseline = {**made_up("raw pixels", "", 0, 61), "images": "", "cpu_s": ""}
    steps = {BASE: 10, "lejepa": 12}
    write_tables(tmp_path / "made_up", "a command", [BASE, "lejepa"], BASE, [baseline, *rows], steps, 1.0)
    text = (tmp_path / "made_up.md").read_text()
    assert text.count("| lejepa | ") == 3
    assert "| raw pixels | 1 | 61.0 | 62.0 |" in text
    assert (tmp_path / "made_up.png").stat().st_size > 10_000


@pytest.mark.parametrize("variant", CONTINUING)
def test_a_variant_that_continues_has_the_bases_data_and_encoder_and_the_shipped_recipe(variant: str) -> None:
    base = Base(str(ROOT / "configs" / "study_emoji.yaml"), ("data.data_path=shards/second",), weights="runs/first")
    config, wanted = trial_config(base, variant, 0, 3), load_config(ROOT / "configs" / "continue.yaml")
    first = load_config(ROOT / "configs" / "study_emoji.yaml")
    assert (config.data.data_path, config.data.multicrop) == ("shards/second", first.data.multicrop)
    assert (config.model.weights, config.model.encoder_kwargs) == ("runs/first", first.model.encoder_kwargs)
    if variant == CONTINUED:
        kept = {"epochs": config.training.epochs, "max_steps": 3, "use_amp": False}
        assert config.masking == wanted.masking
        assert config.training == wanted.training.model_copy(update=kept)
        assert config.loss.anchor_weight == wanted.loss.anchor_weight > 0


def test_leads_of_what_continues_are_over_the_untouched_weights_too(tmp_path: Path) -> None:
    knn = {(BASE, TIME): 40, (CONTINUED, TIME): 52, (UNTOUCHED, ""): 51}
    rows = [made_up(*key, seed, value + seed) for key, value in knn.items() for seed in range(3)]
    write_tables(tmp_path / "made_up", "a command", [BASE, CONTINUED], CONTINUED, rows, {BASE: 9, CONTINUED: 10}, 1.0)
    text = (tmp_path / "made_up.md").read_text()
    assert f"### Lead of {CONTINUED}, points" in text
    assert f"| {UNTOUCHED} | +1.0 ± 0.0 | +1.0 ± 0.0 |" in text
    assert f"| {BASE} | +12.0 ± 0.0 |" in text


@pytest.mark.slow
def test_an_arena_from_a_runs_weights_measures_them_untouched_and_mixed_back(base: Path, tmp_path: Path) -> None:
    run = ["training.max_steps=2", f"logging.run_dir={tmp_path}", "logging.run_name=first", "logging.pictures=false"]
    assert train([str(base), *run]) == 0
    start = ["--weights", str(tmp_path / "first"), "--variants", CONTINUED, "--points", "1", "--equal", TIME]
    assert (
        study.main([str(base), "training.warmup_epochs=0", *start, "--out", str(tmp_path), "--budget", "0.1", "--seeds", "0"])
        == 0
    )
    with (tmp_path / "tiny_arena.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(rows[CONTINUED]["share"]) in SHARES
    assert rows[CONTINUED]["unmixed"]
    assert not rows[BASE]["share"]
    assert rows[UNTOUCHED]["knn"]


@pytest.mark.slow
def test_an_arena_that_was_stopped_continues_and_then_trains_nothing(base: Path, tmp_path: Path) -> None:
    arguments = [str(base), "--out", str(tmp_path), "--budget", "0.1", "--variants", "lejepa", "--points", "2"]
    assert study.main([*arguments, "--seeds", "0"]) == 0
    table, points = tmp_path / "tiny_arena.csv", tmp_path / "tiny_arena_curve.csv"
    lines = points.read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    *kept, last = table.read_text().splitlines(keepends=True)
    assert last.startswith("lejepa,images,0,")
    table.write_text("".join(kept))
    assert study.main([*arguments, "--seeds", "0,1"]) == 0
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["equal"]]
    assert [(row["variant"], row["equal"], row["seed"]) for row in rows] == [
        *((BASE, "time", "0"), ("lejepa", "time", "0"), ("lejepa", "images", "0")),
        *((BASE, "time", "1"), ("lejepa", "time", "1"), ("lejepa", "images", "1")),
    ]
    base_images = {row["seed"]: row["images"] for row in rows if row["variant"] == BASE}
    assert all(row["images"] == base_images[row["seed"]] for row in rows if row["equal"] == "images")
    before = table.read_text(), points.read_text()
    assert study.main([*arguments, "--seeds", "0,1"]) == 0
    assert (table.read_text(), points.read_text()) == before
