"""Numbers gone wrong, and features that collapse."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.hjepa import HJEPA
from model.losses import random_directions
from tests.train.test_run import ROOT, command
from train.build import ALONE, build_dataset, build_masks, build_model, build_training_loader, loop_settings
from train.config import Config
from train.config_file import load_config
from train.guard import CollapseAlarm
from train.loop import batches, train_steps
from train.optim import build_optimizer, ema_momentum, learning_rate
from train.run import main
from train.state import RunState
from train.step import step_seed

STEPS, BAD = 40, (*range(3, 13), 15, 17, *range(20, 28))
# No view term, no SIGReg, a target that is the student itself, and steps so large that collapse takes 100 of them.
WITHOUT_GUARDS = [
    "loss.view_weight=0", "loss.sigreg_weight=0", "training.ema_momentum=0", "training.ema_final_momentum=0",
    "training.lr=5e-2", "training.warmup_epochs=0", "training.max_steps=120",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(data_path: Path, tmp_path: Path) -> Config:
    path, *overrides = command(ROOT / "configs" / "quickstart.yaml", data_path, tmp_path, f"training.max_steps={STEPS}")
    return load_config(Path(path), overrides)


def poison(model: HJEPA, kind: str) -> None:
    """Make the loss, or else one gradient, not a number at the steps of BAD."""
    calls = 0

    def spoil_loss(
        _module: torch.nn.Module, _inputs: object, losses: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        return {**losses, "loss": losses["loss"] * (math.nan if kind == "loss" and calls - 1 in BAD else 1.0)}

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.inf if kind == "gradient" and calls - 1 in BAD else 1.0)

    model.register_forward_hook(spoil_loss)
    next(model.encoder.parameters()).register_hook(spoil_gradient)


def reference(config: Config) -> HJEPA:
    """A plain loop over the same batches that leaves out the updates of BAD."""
    device = torch.device("cpu")
    model = build_model(config, device)
    masks = build_masks(config, model, device)
    loader = build_training_loader(config, build_dataset(config))
    optimizer, settings = build_optimizer(model, 0.05, (0.9, 0.95)), loop_settings(config, len(loader), device)
    for step, batch in zip(range(STEPS), batches(loader), strict=False):
        torch.manual_seed(step_seed(config.seed, step, 1))
        plan = masks(len(batch.labels))
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, 0))
        directions = random_directions(settings.projector_dim, settings.sigreg_slices, generator, device)
        if step in BAD:
            continue
        model(batch.crops, batch.boxes, batch.flips, plan, directions)["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, settings.warmup_steps, settings.lr, settings.final_lr)
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(ema_momentum(step, STEPS, settings.ema_momentum, settings.ema_final_momentum))
    return model


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_twenty_steps_that_are_not_finite_leave_the_weights_as_if_their_updates_had_been_left_out(
    config: Config, kind: str
) -> None:
    device, state, lines, saved = torch.device("cpu"), RunState(), [], []
    model = build_model(config, device)
    loader = build_training_loader(config, build_dataset(config))
    optimizer = build_optimizer(model, 0.05, (0.9, 0.95))
    poison(model, kind)
    train_steps(
        model, model, build_masks(config, model, device), optimizer, loader, state,
        loop_settings(config, len(loader), device), ALONE,
        log=lines.append, tell=print, show=lambda: None, probe=lambda: None,
        save=lambda: saved.append(state.skipped_steps), stop=lambda: False,
    )  # fmt: skip
    expected = reference(config)
    for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert saved == [len(BAD)]
    assert len(BAD) == 20
    assert [line["skipped_steps"] for line in lines] == [7, 12, 20, 20]
    losses = [line["loss"] for line in lines]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(math.isfinite(value) for state in optimizer.state.values() for value in state["exp_avg_sq"].flatten())


def spoil_every_model_from_its_call(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Every model that the command builds gives losses that are not a number from call `first` on."""
    plain, calls = HJEPA.forward, iter(range(10**6))

    def forward(self: HJEPA, *inputs: object) -> dict[str, torch.Tensor]:
        losses = plain(self, *inputs)  # type: ignore[arg-type]
        return {**losses, "loss": losses["loss"] * (math.nan if next(calls) >= first else 1.0)}

    monkeypatch.setattr(HJEPA, "forward", forward)


def test_too_many_in_a_row_go_back_to_the_last_checkpoint_once_and_then_stop_with_advice(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.max_steps=30", "training.max_skipped_steps=3", "checkpoint.save_frequency=5"]
    arguments = command(ROOT / "configs" / "quickstart.yaml", data_path, tmp_path, *settings, "logging.log_frequency=1")
    with monkeypatch.context() as context:
        spoil_every_model_from_its_call(context, 12)
        assert main(arguments) == 3
    said = capsys.readouterr().out
    assert said.count("going back to the last checkpoint") == 1
    assert said.count("step_00000010 (step 10 of 30)") == 1
    assert "step 13: 3 steps in a row without a finite loss and gradient again; stopped" in said
    assert "Lower training.lr" in said
    assert [path.name for path in sorted((tmp_path / "quickstart" / "checkpoints").iterdir())][-1] == "step_00000010"
    assert main(arguments) == 0  # the trouble is over, and the same command goes on
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["steps"] == 30


def test_the_alarm_rings_once_until_both_signals_have_recovered() -> None:
    alarm, state = CollapseAlarm(100), RunState()
    ranks = [50, 4.9, 4, 6, 7, 8, 4, 50, 50, 50]
    stds = [1.0, 1.0, 1.0, 1.0, 0.009, 1.0, 1.0, 1.0, 0.009, 0.02]
    for step, signals in enumerate(zip(ranks, stds, strict=True)):
        state.step = step
        text = alarm.check(state, dict(zip(("rankme", "feature_std"), signals, strict=True)), rows=512)
        assert text is None or "loss.view_weight" in text
    assert state.alarms == [1, 6, 8]
    assert not state.collapsed


@pytest.mark.parametrize(
    ("changes", "rings"),
    [([], False), pytest.param(WITHOUT_GUARDS, True, marks=pytest.mark.slow)],  # the second rings on some crops only
    ids=["quickstart", "without guards"],
)
def test_the_alarm_rings_for_a_run_without_guards_and_not_for_the_quickstart(
    changes: list[str], rings: bool, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickstart's own model and settings; only the photographs are those of the tests."""
    paths = ["data.dataset=custom", f"data.data_path={data_path}", f"logging.run_dir={tmp_path}"]
    steps = ["training.epochs=60", "training.max_steps=100", "logging.log_frequency=20", "logging.tensorboard=false"]
    given = {override.partition("=")[0]: override for override in [*paths, *steps, *changes]}
    assert main([str(ROOT / "configs" / "quickstart.yaml"), *given.values()]) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert bool(summary["collapse_alarms"]) == rings
    assert max(line["collapse_alarm"] for line in lines) == rings
    assert said.count("collapse alarm at step") == len(summary["collapse_alarms"])
