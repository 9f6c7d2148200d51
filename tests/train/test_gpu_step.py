"""The trainer's step on a GPU: bf16 on uint8 crops, and what a loss or a gradient that is not finite leaves as it was."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.masks import STRATEGIES
from tests.train.test_run import QUICKSTART, command
from train.config.load import load_config
from train.config.schema import Config
from train.run import find_compiler
from train.trainer import Trainer

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(device: str, data_path: Path, tmp_path: Path, *changes: str) -> Config:
    given = [f"device={device}", "data.crop_device=cpu", "training.max_steps=30", *changes]
    path, *overrides = command(QUICKSTART, data_path, tmp_path, *given)
    return load_config(Path(path), overrides)


def first_losses(trainer: Trainer, autocast: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of the first batch, on masks that are the same in each call."""
    batch, config = next(iter(trainer.loader)), trainer.config
    assert {crop.dtype for crop in batch.crops} == {torch.uint8}
    torch.manual_seed(0)
    plan = trainer.masks(len(batch.labels))
    directions = torch.randn(config.model.projector_dim, config.loss.sigreg_slices, device=trainer.device)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=autocast):
        losses = trainer.model(batch.crops, batch.boxes, batch.flips, plan, directions / directions.norm(dim=0))
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return losses, gradients


@on_each_device
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_on_uint8_crops_is_near_float32(device: str, strategy: str, data_path: Path, tmp_path: Path) -> None:
    config = config_of(device, data_path, tmp_path, f"masking.strategy={strategy}")
    (losses, gradients), (exact, exact_gradients) = (first_losses(Trainer(config), each) for each in (True, False))
    assert losses["loss"].device.type == ("cuda" if device == "gpu" else "cpu")
    assert losses["loss"].dtype == torch.float32
    for name in ("loss", "level_0", "view", "sigreg"):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.1), name
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert bool(gradient.isfinite().all()), name
    together = [torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, exact_gradients)]
    assert float(torch.nn.functional.cosine_similarity(*together, dim=0)) > 0.9


def left_by(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, the target's among them, and moments, copied."""
    tensors = dict(trainer.model.state_dict())
    for name, parameter in trainer.model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in trainer.optimizer.state.get(parameter, {}).items()}
    return copy.deepcopy({name: tensor.detach() for name, tensor in tensors.items()})


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@on_each_device
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    device: str, kind: str, value: float, data_path: Path, tmp_path: Path
) -> None:
    trainer, spoilt = Trainer(config_of(device, data_path, tmp_path)), [1.0]

    def spoil_loss(_module: object, _inputs: object, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**losses, "loss": losses["loss"] * (spoilt[0] if kind == "loss" else 1.0)}

    trainer.model.register_forward_hook(spoil_loss)
    weight = next(trainer.model.encoder.parameters())
    weight.register_hook(lambda gradient: gradient * (spoilt[0] if kind == "gradient" else 1.0))
    for _ in range(2):
        trainer.train_step()
    sound = left_by(trainer)
    spoilt[0] = value
    for _ in range(2):
        trainer.train_step()
    assert changed(sound, left_by(trainer)) == []
    spoilt[0] = 1.0
    trainer.train_step()
    after = left_by(trainer)
    assert len(changed(sound, after)) > 0.5 * len(sound)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    trainer.monitor.read_counts()
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (2, 0)


WAYS = [
    pytest.param("gpu", "true", marks=pytest.mark.gpu), pytest.param("gpu", "cudagraphs", marks=pytest.mark.gpu),
    pytest.param("cpu", "true", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("device", "way"), WAYS)
def test_compiled_steps_have_the_losses_of_eager_ones(device: str, way: str, data_path: Path, tmp_path: Path) -> None:
    try:
        find_compiler()
    except ValueError as error:
        pytest.skip(str(error))
    changes = ("training.use_amp=false", "logging.log_frequency=1")
    eager, compiled = (
        [trainer.train_step() for _ in range(6)]
        for trainer in (
            Trainer(config_of(device, data_path, tmp_path, f"training.compile={c}", *changes)) for c in ("false", way)
        )
    )
    for one, other in zip(eager, compiled, strict=True):
        for name in ("loss", "level_0", "view", "sigreg", "grad_norm", "rankme"):
            assert one[name] == pytest.approx(other[name], rel=1e-3 if device == "cpu" else 1e-2), name
