"""Muon: its orthogonalisation over many shapes, its update against torch's and a slow reference, and steps that are skipped."""

import pytest
import torch
from torch import nn

from tests.train.test_run import QUICKSTART
from train.build import build_model
from train.config.load import load_config
from train.optim import MUON_A, MUON_B, MUON_C, MuonAdamW, build_optimizer, orthogonalized

SHAPES = [(64, 192), (256, 64), (64, 256), (64, 64), (8, 300)]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in SHAPES)
        self.head = nn.Linear(64, 3)


def built(name: str) -> tuple[Blocks, MuonAdamW]:
    torch.manual_seed(0)
    model = Blocks()
    optimizer = build_optimizer(model, 0.05, (0.9, 0.95), name)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return model, optimizer


def give_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 5), (16, 64), (64, 65), (96, 384)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_have_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        inside = left.T @ result.double() @ right.T
        found = inside.diagonal()[values > 0.05 * values.max()]
        assert 0.6 < found.min() <= found.max() < 1.3
        assert (inside - inside.diagonal().diag()).abs().max() < 1e-3


def test_an_update_is_torchs_up_to_its_bfloat16_and_a_slow_reference() -> None:
    model, optimizer = built("muon")
    theirs = Blocks()
    theirs.load_state_dict(model.state_dict())
    weights = [block.weight for block in theirs.blocks]
    reference = [weight.detach().double().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in reference]
    muon = torch.optim.Muon(weights, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        give_gradients(model, step)
        give_gradients(theirs, step)
        for number, weight in enumerate(weights):
            gradient = weight.grad.double()
            momenta[number] = 0.95 * momenta[number] + 0.05 * gradient
            x = 0.05 * gradient + 0.95 * momenta[number]
            x = x / x.norm()
            for _ in range(5):
                x = MUON_A * x + MUON_B * (x @ x.T) @ x + MUON_C * (x @ x.T) @ (x @ x.T) @ x
            scale = 0.01 * 0.2 * max(weight.shape) ** 0.5
            reference[number] = reference[number] * (1 - 0.01 * 0.05) - scale * x
        optimizer.step()
        muon.step()
    for ours, torchs, slow in zip(model.blocks, weights, reference, strict=True):
        torch.testing.assert_close(ours.weight.double(), slow, atol=2e-6, rtol=0)
        assert (ours.weight - torchs).std() < 0.02 * (ours.weight - ours.weight.mean()).std()


def test_all_other_weights_have_the_steps_of_adamw() -> None:
    model, optimizer = built("muon")
    other, adamw = built("adamw")
    for step in range(3):
        for net, each in ((model, optimizer), (other, adamw)):
            give_gradients(net, step)
            each.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (ours.ndim == 1 or name.startswith("head"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(name: str) -> None:
    model, optimizer = built(name)
    before: dict[str, torch.Tensor] = {}
    for step, skipped in enumerate([False, True, False]):
        give_gradients(model, step)
        if skipped:
            before = {key: value.clone() for key, value in model.state_dict().items()}
            momenta = [{**state} for state in optimizer.state.values()]
            momenta = [{key: value.clone() for key, value in state.items()} for state in momenta]
            next(model.parameters()).grad.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        if skipped:
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            for state, kept in zip(optimizer.state.values(), momenta, strict=True):
                assert all(torch.equal(value, kept[key]) for key, value in state.items() if key != "step")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.blocks[0].weight, before["blocks.0.weight"])


def test_the_groups_hold_every_parameter_once() -> None:
    model, optimizer = built("muon")
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    hidden = [name for group in optimizer.param_groups if group["muon"] for name in group["names"]]
    assert hidden == [f"blocks.{number}.weight" for number in range(len(SHAPES))]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_each_layer_has_the_rate_of_beit_and_the_heads_have_the_whole_rate(name: str, decay: float) -> None:
    model = build_model(
        load_config(QUICKSTART, ["loss.prediction_weight=1.0", "masking.strategy=global_only"]), torch.device("cpu")
    )
    depth = len(model.encoder.vit.blocks)
    rates = [decay ** (depth + 1 - layer) for layer in range(depth + 2)]  # as in BEiT: embeddings, blocks, what follows
    found = {key: group["lr_scale"] for group in build_optimizer(model, 0.05, (0.9, 0.95), name, decay).param_groups
             for key in group["names"]}  # fmt: skip
    assert found.keys() == {key for key, value in model.named_parameters() if value.requires_grad}
    assert any(key.startswith("predictor.blocks.0.") for key in found)
    for key, scale in found.items():
        part = key.removeprefix("encoder.vit.")
        layer = depth + 1 if part == key or part.startswith("norm") else 0
        layer = int(part.split(".")[1]) + 1 if part != key and part.startswith("blocks") else layer
        assert scale == pytest.approx(rates[layer]), key
