"""Steps that are not finite, and features that collapse."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.hjepa import HJEPA
from model.losses import random_directions
from tests.train.test_run import QUICKSTART, command
from train.checkpoint import list_checkpoints
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.measure import rankme
from train.monitor import watch_for_collapse
from train.run import main
from train.state import RunState
from train.trainer import Trainer, batches, step_seed

STEPS, BAD = 40, (*range(3, 13), 15, 17, *range(20, 28))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(data_path: Path, tmp_path: Path) -> Config:
    path, *overrides = command(QUICKSTART, data_path, tmp_path, f"training.max_steps={STEPS}")
    return load_config(Path(path), overrides)


def poison(model: HJEPA, kind: str) -> None:
    """Make the loss, or else one gradient, not a number at the steps of BAD."""
    calls = 0

    def spoil_loss(_module: torch.nn.Module, _inputs: object, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        return {**losses, "loss": losses["loss"] * (math.nan if kind == "loss" and calls - 1 in BAD else 1.0)}

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.inf if kind == "gradient" and calls - 1 in BAD else 1.0)

    model.register_forward_hook(spoil_loss)
    next(model.encoder.parameters()).register_hook(spoil_gradient)


def reference(config: Config) -> HJEPA:
    """A plain loop over the same batches that leaves out the updates of BAD."""
    trainer, device = Trainer(config), torch.device("cpu")
    model, optimizer, schedule = trainer.model, trainer.optimizer, trainer.schedule
    for step, batch in zip(range(STEPS), batches(trainer.loader), strict=False):
        torch.manual_seed(step_seed(config.seed, step, 1))
        plan = trainer.masks(len(batch.labels))
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, 0))
        directions = random_directions(config.model.projector_dim, config.loss.sigreg_slices, generator, device)
        if step in BAD:
            continue
        model(batch.crops, batch.boxes, batch.flips, plan, directions)["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(schedule.momentum(step))
    return model


def trained(config: Config, kind: str | None = None) -> tuple[Trainer, list[dict[str, float]]]:
    """A trainer at its last step, and what it would have logged; poisoned, if `kind` is given."""
    trainer, lines = Trainer(config), []
    if kind is not None:
        poison(trainer.model, kind)
    while not trainer.complete:
        if values := trainer.train_step():
            lines.append(values)
    return trainer, lines


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_twenty_steps_that_are_not_finite_leave_the_weights_as_if_their_updates_had_been_left_out(
    config: Config, kind: str
) -> None:
    trainer, lines = trained(config, kind)
    expected = reference(config)
    for (name, ours), theirs in zip(trainer.model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(BAD) == trainer.state.skipped_steps == 20
    assert [line["skipped_steps"] for line in lines] == [7, 12, 20, 20]
    losses = [line["loss"] for line in lines]
    assert all(math.isfinite(loss) for loss in losses)
    states = [state for each in trainer.optimizer.state.values() for state in each.items()]
    assert {name for name, _ in states} >= {"exp_avg_sq", "momentum"}  # of AdamW and of Muon
    assert all(value.isfinite().all() for _, value in states)


def spoil_every_model_from_its_call(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Every model that the command builds gives losses that are not a number from call `first` on."""
    plain, calls = HJEPA.forward, iter(range(10**6))

    def forward(self: HJEPA, *inputs: object) -> dict[str, torch.Tensor]:
        losses = plain(self, *inputs)  # type: ignore[arg-type]
        return {**losses, "loss": losses["loss"] * (math.nan if next(calls) >= first else 1.0)}

    monkeypatch.setattr(HJEPA, "forward", forward)


def test_too_many_in_a_row_stop_the_run_with_advice(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.max_steps=30", "training.max_skipped_steps=3", "checkpoint.save_frequency=5"]
    arguments = command(QUICKSTART, data_path, tmp_path, *settings, "logging.log_frequency=1")
    with monkeypatch.context() as context:
        spoil_every_model_from_its_call(context, 12)
        assert main(arguments) == 3
    said = capsys.readouterr().out
    assert "step 15: 3 steps in a row" in said
    assert "training.lr" in said
    assert list_checkpoints(tmp_path / "quickstart" / "checkpoints")[-1].name == "step_00000010"
    assert main(arguments) == 0  # with a sound model, the same command continues
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["steps"] == 30


def test_the_alarm_rings_once_until_both_signals_have_recovered() -> None:
    state = RunState()
    ranks = [50, 4.9, 4, 6, 7, 8, 4, 50, 50, 50]
    stds = [1.0, 1.0, 1.0, 1.0, 0.009, 1.0, 1.0, 1.0, 0.009, 0.02]
    for step, signals in enumerate(zip(ranks, stds, strict=True)):
        state.step = 100 + step
        watch_for_collapse(state, *signals, max_rank=100)
    assert state.alarms == [101, 106, 108]
    assert not state.collapsed


def test_in_the_first_steps_a_low_rank_is_no_collapse() -> None:
    state = RunState()
    for state.step, rank in ((10, 50), (20, 4), (99, 4)):  # the state's step counts
        watch_for_collapse(state, rank, 1.0, max_rank=100)
    assert state.alarms == []
    watch_for_collapse(state, 50, 0.001, max_rank=100)
    assert state.alarms == [99]


class Collapsing(HJEPA):
    """A model without guards: the target is the student itself, the loss's gradient flows into it, nothing trails behind.

    One vector for all images then has no loss, and the step goes there from any start. A target without gradient is not
    enough to make collapse certain: with momentum 0 and no more, some seeds resist for thousands of steps.
    """

    _targets = HJEPA._targets.__wrapped__  # type: ignore[attr-defined]  # without its no_grad

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.target = self.encoder

    def update_target(self, momentum: float, skip: torch.Tensor | None = None) -> None:
        pass

    def forward(self, *inputs: object) -> dict[str, torch.Tensor]:
        losses = super().forward(*inputs)  # type: ignore[arg-type]
        return {**losses, "features": losses["features"].detach()}


def trained_as(kind: type[HJEPA], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The log of a run with a model of this kind."""
    monkeypatch.setattr("train.build.HJEPA", kind)
    return trained(load_config(Path(arguments[0]), arguments[1:]))[1]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_the_alarm_rings_on_a_toy_that_collapses_and_is_silent_on_the_same_with_its_guards(
    seed: int, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same crops and steps. Wide margins on both sides of a RankMe of 2, where it rings for features this narrow."""
    settings = ["training.lr=2e-2", "training.warmup_epochs=0", "training.epochs=1000", "training.max_steps=120"]
    settings += ["training.final_lr_ratio=1", "logging.log_frequency=20", f"seed={seed}"]
    settings += ["training.optimizer=adamw"]  # in a toy that is made to fall at once
    arguments = command(QUICKSTART, data_path, tmp_path, *settings)
    falling = trained_as(Collapsing, [*arguments, "loss.view_weight=0", "loss.sigreg_weight=0"], monkeypatch)
    (alarm,) = caplog.messages
    assert alarm.startswith("collapse alarm at step 100:")
    assert "loss.view_weight" in alarm
    assert falling[-1]["collapse_alarm"]
    assert falling[-1]["rankme"] < 1.5
    assert falling[-1]["feature_std"] < 0.1 * falling[0]["feature_std"]
    caplog.clear()
    healthy = trained_as(HJEPA, arguments, monkeypatch)
    assert caplog.messages == []
    assert min(line["rankme"] for line in healthy) > 3
    assert min(line["feature_std"] for line in healthy) > 0.5 * healthy[0]["feature_std"]
    print("\nRankMe at the end, without guards and with:", falling[-1]["rankme"], healthy[-1]["rankme"])


@pytest.mark.slow
def test_the_alarm_is_silent_on_the_quickstart(data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own model and settings; only the photographs are those of the tests."""
    paths = ["data.dataset=custom", f"data.data_path={data_path}", f"logging.run_dir={tmp_path}"]
    steps = ["training.epochs=60", "training.max_steps=60", "logging.log_frequency=20"]
    steps += ["logging.tensorboard=false", "logging.pictures=false"]
    assert main([str(QUICKSTART), *paths, *steps]) == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert summary["collapse_alarms"] == []
    assert max(line["collapse_alarm"] for line in lines) == 0
    assert "collapse alarm" not in capsys.readouterr().out


@pytest.mark.parametrize(("count", "width", "rank"), [(512, 384, 384), (64, 384, 64), (300, 64, 7), (40, 40, 1), (2, 8, 2)])
def test_rankme_equals_its_definition_by_singular_values(count: int, width: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, rank)) @ (rng.normal(size=(rank, width)) * rng.uniform(0.1, 3, (rank, 1)))
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert rankme(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-5)  # sqrt of float64's precision
    assert rankme(torch.from_numpy(features).float()) == pytest.approx(expected, rel=1e-4)
