"""The study of continuing: its settings, what chooses a mixture, its tables, and a whole small study."""

import argparse
from pathlib import Path

import pytest

from tests.train.test_run import ROOT
from tools.studies import continuing
from tools.studies.continuing import CHOICES, CHOSEN, CONFIGS, FIELDS, RECIPE, SCRATCH, SMALL, VARIANTS, Pair, Trial
from tools.studies.grid import BASE
from tools.studies.tables import BASELINES
from tools.study import append_rows
from train.config.load import load_config
from train.run import main as train


@pytest.mark.parametrize("variant", [BASE, *VARIANTS])
def test_a_variant_has_the_studys_data_and_encoder_and_the_shipped_recipe(variant: str) -> None:
    pair = Pair(str(CONFIGS / "study_emoji.yaml"), SMALL, weights="runs/first", data="shards/second")
    config = load_config(Path(pair.config), pair.settings(variant))
    base, shipped = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("study_emoji", "continue"))
    assert (config.data.data_path, config.data.augmentation) == ("shards/second", base.data.augmentation)
    assert config.model.encoder_kwargs == {**base.model.encoder_kwargs, "depth": 4}
    assert config.model.weights == (None if variant == BASE else "runs/first")
    if variant in (BASE, RECIPE):
        wanted = base if variant == BASE else shipped
        assert config.masking == wanted.masking
        same = {"use_amp": wanted.training.use_amp, "epochs": wanted.training.epochs, "max_steps": wanted.training.max_steps}
        assert config.training.model_copy(update=same) == wanted.training
        assert config.loss.summary_weight == wanted.loss.summary_weight
        assert config.loss.anchor_weight == wanted.loss.anchor_weight


def rows(weights: str, variant: str, seed: int, *knn: float) -> list[dict[str, object]]:
    shares = [number / max(len(knn) - 1, 1) for number in range(len(knn))]
    figures = {"linear": 50, "rankme": 9, "uniformity": -2, "cosine": 1, "steps": 3, "cpu_s": 1}
    trial = Trial(weights, "shards/second", variant, seed)
    figures |= trial._asdict() | {"knn_first": 40}
    return [{**figures, "share": share, "chosen": int(share == 0.5), "knn": value, "knn_train": -abs(share - 0.5)}
            for share, value in zip(shares, knn, strict=True)]  # fmt: skip


def test_the_tables_show_leads_at_the_same_seed_of_the_mixture_that_the_training_images_chose(tmp_path: Path) -> None:
    table = tmp_path / "continuing.csv"
    for seed, shift in enumerate((0.0, 2.0, 4.0)):
        append_rows(table, FIELDS, rows("", "raw pixels", seed, 30))
        append_rows(table, FIELDS, rows("", SCRATCH, seed, 40 + shift))
        append_rows(table, FIELDS, rows("runs/first", RECIPE, seed, 50, 51 + shift, 52 + shift, 49, 45))
    continuing.write_study(argparse.Namespace(budget=1.0, set=[]), tmp_path / "continuing", {BASE: 7, RECIPE: 8})
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in (tmp_path / "continuing.md").read_text().splitlines() if line.startswith("|")}  # fmt: skip
    assert lines[RECIPE][:2] == ["3", "54.00 ± 5.0"]
    assert lines[RECIPE][-3:] == ["0.50 ± 0.0", "+4.0 ± 5.0", "+12.0 ± 0.0"]
    assert lines["untouched"][-2:] == ["+0.0 ± 0.0", "+8.0 ± 5.0"]
    assert lines["recipe, not mixed"][1] == "45.00 ± 0.0"
    assert lines[CHOSEN] == ["3", "+4.00 ± 5.0", "+2.0"]
    assert lines["always 1"] == ["3", "-5.00 ± 0.0", "-5.0"]
    assert lines["the validation labels, which is no fair score"][2] == "+2.0"
    assert set(CHOICES) <= lines.keys()


@pytest.mark.slow
def test_a_study_of_continuing_is_resumed_and_its_share_0_is_the_untouched_encoder(data_path: Path, tmp_path: Path) -> None:
    tiny = ["data.batch_size=8", "training.warmup_epochs=0", "model.encoder_kwargs.embed_dim=16", "loss.sigreg_slices=8"]
    run = ["model.encoder_kwargs.depth=4", "training.max_steps=2", f"logging.run_dir={tmp_path}", "logging.run_name=first"]
    run += ["logging.pictures=false", f"data.data_path={data_path}"]
    assert train([str(CONFIGS / "study_emoji.yaml"), *tiny, *run]) == 0
    arguments = [f"{tmp_path / 'first'}:{data_path}", "--budget", "0.2", "--seeds", "0", "--out", str(tmp_path), "--set", *tiny]
    assert continuing.main(arguments) == 0
    table = tmp_path / "continuing.csv"
    before = table.read_text()
    trials = continuing.read_table(table)
    assert [trial.variant for trial in trials] == [*BASELINES, SCRATCH, RECIPE]
    mixtures = trials[Trial(str(tmp_path / "first"), str(data_path), RECIPE, 0)]
    assert [row["share"] for row in mixtures] == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert float(mixtures[0]["cosine"]) == pytest.approx(1, abs=1e-3)
    assert mixtures[0]["knn"] == mixtures[0]["knn_first"]  # the two sets are one here
    assert continuing.main(arguments) == 0
    assert table.read_text() == before
    assert "untouched" in (tmp_path / "continuing.md").read_text()


def test_a_pair_without_folders_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert continuing.main(["nowhere", "--out", str(tmp_path)]) == 2
    assert "write RUN:SHARDS" in capsys.readouterr().err
    assert continuing.main(["nowhere", "--variants", "recipes"]) == 2
    assert "recipes: unknown" in capsys.readouterr().err
