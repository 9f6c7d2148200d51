"""Continuing without forgetting: frozen blocks, heads first, the anchor, the schedule, and mixing back with the start."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.losses import anchor_loss
from tests.conftest import without_labels
from tests.train.test_run import QUICKSTART, ROOT, command
from tools.export import main as export
from train.adapt.mix import SHARES, best_share, described, mixed, uniformity
from train.adapt.prove import verdict
from train.adapt.weights import starting_encoder
from train.config.load import load_config
from train.config.schema import Config
from train.run import main as train
from train.trainer import Trainer

CONTINUE, CPU = ROOT / "configs" / "continue.yaml", torch.device("cpu")


def settings(config: Path, data_path: Path, folder: Path, *changes: str) -> Config:
    path, *overrides = command(config, data_path, folder, *changes)
    return load_config(Path(path), overrides)


@pytest.fixture(scope="module")
def first(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("first")
    assert train(command(QUICKSTART, data_path, folder, "training.max_steps=2", "logging.run_name=first")) == 0
    return folder / "first"


def test_frozen_parameters_keep_their_bits_and_no_gradients_and_the_heads_learn_first(
    first: Path, data_path: Path, tmp_path: Path
) -> None:
    changes = ["training.train_blocks=last_1", "training.heads_first_ratio=0.5", "training.max_steps=4", "training.lr=0.1"]
    trainer = Trainer(settings(CONTINUE, data_path, tmp_path, f"model.weights={first}", *changes))
    start = starting_encoder(trainer.config, CPU).state_dict()
    heads = {name: value.clone() for name, value in trainer.model.state_dict().items() if "projector" in name}
    assert heads
    for _ in range(2):
        trainer.train_step()
    for encoder in (trainer.model.encoder, trainer.model.target):
        assert all(torch.equal(value, start[name]) for name, value in encoder.state_dict().items())
    assert not all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in heads.items())
    for _ in range(2):
        trainer.train_step()
    for encoder in (trainer.model.encoder, trainer.model.target):
        moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, start[name])}
        assert {name.split(".")[1] for name in moved} == {"blocks", "norm"}
        assert all(name.startswith(("vit.blocks.1.", "vit.norm.")) for name in moved)
    frozen = [name for name, value in trainer.model.encoder.named_parameters() if not value.requires_grad]
    assert any("patch_embed" in name for name in frozen)
    assert any("blocks.0." in name for name in frozen)


def test_the_schedule_has_a_floor_heads_first_and_no_fast_forgetting(first: Path, data_path: Path, tmp_path: Path) -> None:
    changes = ["training.epochs=1", "training.min_steps=60", "training.heads_first_ratio=0.5", "training.ema_momentum=0.9"]
    changes += [f"model.weights={first}", "training.warmup_epochs=1", "training.ema_final_momentum=0.9"]
    schedule = Trainer(settings(CONTINUE, data_path, tmp_path, *changes)).schedule
    assert (schedule.total_steps, schedule.heads_steps, schedule.warmup_steps) == (60, 30, 12)
    rates = [schedule.lr(step) / schedule.peak_lr for step in range(60)]
    assert rates[:30] == [1.0] * 30
    assert rates[30] == pytest.approx(1 / 12)
    assert rates[41] == 1.0
    assert rates[59] == 0.0
    assert schedule.momentum(0) == 0.9


def test_the_anchor_is_nothing_at_the_start_and_pulls_back_after_it() -> None:
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert float(anchor_loss(tokens, 3 * tokens)) == pytest.approx(0, abs=1e-6)
    assert float(anchor_loss(tokens, -tokens)) == pytest.approx(4)


def test_an_anchor_without_weights_is_refused(data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(command(QUICKSTART, data_path, tmp_path, "loss.anchor_weight=1.0")) == 2
    assert "name it with model.weights" in capsys.readouterr().err
    assert train(command(QUICKSTART, data_path, tmp_path, "training.train_blocks=two")) == 2


@pytest.mark.parametrize("name", ["continue", "highres"])
def test_a_continued_run_exports_the_best_mixture_with_its_start(
    name: str, first: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"model.weights={first}", "training.max_steps=3", "logging.run_name=second", "evaluation.eval_frequency=0"]
    changes += ["data.multicrop.global_crop_size=48", "evaluation.linear_epochs=0", "training.min_steps=0"]
    assert train(command(ROOT / "configs" / f"{name}.yaml", data_path, tmp_path, *changes)) == 0
    said, run = capsys.readouterr().out, tmp_path / "second"
    assert "log-uniformity of the starting weights' features" in said
    summary = json.loads((run / "summary.json").read_text())
    knn, mixtures = summary["knn"], summary["mixtures"]
    assert (mixtures["0.0"], mixtures["1.0"]) == (knn["start"], knn["trained"])
    best = next(share for share in SHARES if f"{share:.0%} is exported" in said)
    assert knn["mixed"] == mixtures[str(best)]
    assert re.findall(r"(\d+)%: [\d.]+ % \(", " ".join(said.split())) == ["0", "25", "50", "75", "100"]
    assert export([str(run), "--out", str(tmp_path / "out"), "--license", "mit"]) == 0
    trained = {key.removeprefix("target.vit."): value
               for key, value in load_file(run / "checkpoints" / "step_00000003" / "model.safetensors").items()}  # fmt: skip
    start = starting_encoder(settings(QUICKSTART, data_path, tmp_path, f"model.weights={first}"), CPU).vit.state_dict()
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, torch.lerp(start[key], trained[key], best)), key


def test_a_continued_run_that_is_resumed_while_the_heads_learn_equals_one_that_never_stopped(
    first: Path, data_path: Path, tmp_path: Path
) -> None:
    changes = [f"model.weights={first}", "training.heads_first_ratio=0.5", "training.min_steps=0", "training.max_steps=6"]
    changes += ["evaluation.eval_frequency=0", "training.final_lr_ratio=1.0", "training.lr=0.01", "checkpoint.save_frequency=2"]
    assert train(command(CONTINUE, data_path, tmp_path, *changes, "logging.run_name=whole")) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "resumed" / "encoder.safetensors").unlink()
    assert train(command(CONTINUE, data_path, tmp_path, *changes, "logging.run_name=resumed")) == 0
    for name in ("checkpoints/step_00000006/model.safetensors", "encoder.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_mixtures_begin_at_the_start_and_end_at_the_trained_encoder(first: Path, data_path: Path, tmp_path: Path) -> None:
    config = settings(QUICKSTART, data_path, tmp_path, f"model.weights={first}")
    start, trained = starting_encoder(config, CPU), starting_encoder(config, CPU)
    torch.nn.init.normal_(trained.vit.norm.weight)
    for share, wanted in ((0.0, start), (1.0, trained)):
        encoder = mixed(start, trained, share)
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_a_mixture_is_chosen_only_when_it_gains_more_than_two_standard_errors() -> None:
    def chosen(gained: int, lost: int, count: int = 1000) -> float:
        start, mixture = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        start[:500], mixture[lost : 500 + gained] = True, True
        return best_share({0.0: start, 0.5: mixture, 1.0: torch.zeros_like(start)})

    assert chosen(gained=0, lost=0) == 0.0
    assert chosen(gained=30, lost=30) == 0.0
    assert chosen(gained=40, lost=28) == 0.0  # 12 more, of 68 that differ: 1.5 standard errors
    assert chosen(gained=40, lost=20) == 0.5  # 2.6
    assert chosen(gained=5, lost=0) == 0.5


def test_uniformity_orders_features_and_says_what_it_means() -> None:
    generator = torch.Generator().manual_seed(0)
    spread, point = torch.randn(3000, 64, generator=generator), torch.ones(50, 64)
    assert uniformity(point) == pytest.approx(0, abs=1e-5)
    assert uniformity(spread) < -3.0
    assert "spread out" in described(uniformity(spread))
    assert "close together" in described(uniformity(point))


def test_prove_trains_three_seeds_once_and_says_in_one_line_what_came_of_it(
    first: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["training.min_steps=0", "training.max_steps=2", "evaluation.eval_frequency=0", "logging.run_name=mine"]
    arguments = [*command(CONTINUE, data_path, tmp_path, *changes, f"model.weights={first}"), "--prove"]
    assert train(arguments) == 0
    said = capsys.readouterr().out
    knn = [json.loads((tmp_path / f"mine-seed{seed}" / "summary.json").read_text())["knn"] for seed in range(3)]
    gain = sum(each["mixed"] - each["start"] for each in knn) / 3
    assert said.count("\n") == 1
    assert f"{knn[0]['start']:.1f} % untouched" in said
    assert f"{gain:+.1f} ± " in said
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("mine-seed*/checkpoints/*"))]
    assert train(arguments) == 0
    assert capsys.readouterr().out == said
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("mine-seed*/checkpoints/*"))] == before


def test_a_gain_is_told_from_none_by_its_interval(tmp_path: Path) -> None:
    def said(*gains: float) -> str:
        for seed, gain in enumerate(gains):
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            summary = {"knn": {"start": 50.0, "mixed": 50.0 + gain}, "validation_images": 24}
            (tmp_path / str(seed) / "summary.json").write_text(json.dumps(summary))
        return verdict([tmp_path / str(seed) for seed in range(3)])

    assert said(1, 2, 3).startswith("no difference can be told")  # 2 ± 2.5
    assert said(2, 2, 3).startswith("adapting helped: k-NN of 24 validation images 50.0 % untouched, 52.3 % adapted, +2.3 ± 1.4")
    assert said(-2, -2, -3).startswith("adapting hurt")
    assert said(0, 0, 0).startswith("no difference")


def test_prove_is_refused_where_nothing_can_be_compared(
    first: Path, tmp_path: Path, data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*command(QUICKSTART, data_path, tmp_path), "--prove"]) == 2
    assert "model.weights is not set" in capsys.readouterr().err
    bare = without_labels(data_path, tmp_path / "bare")
    assert train([*command(CONTINUE, bare, tmp_path, f"model.weights={first}"), "--prove"]) == 2
    assert "samples without labels" in capsys.readouterr().err
    assert not (tmp_path / "continued-seed0").exists()
