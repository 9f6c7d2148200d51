"""N ranks compute what one rank computes on the joined batch, in real gloo processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from model.hjepa import HJEPA
from model.losses import BatchStandardize, SIGReg, random_directions, view_loss
from model.masks import MaskPlan

RANKS = 2


def part_of(inputs: dict, rank: int) -> dict:
    rows = slice(rank * 6 // RANKS, (rank + 1) * 6 // RANKS)
    plan: MaskPlan = inputs["plan"]
    cut = {name: None if value is None else value[rows] for name, value in vars(plan).items() if name != "queries"}
    return {
        "crops": [crop[rows] for crop in inputs["crops"]],
        "boxes": inputs["boxes"][rows],
        "flips": inputs["flips"][rows],
        "plan": MaskPlan(queries=tuple(level[rows] for level in plan.queries), **cut),
        "directions": inputs["directions"],
    }


def terms(project: nn.Module, features: torch.Tensor) -> torch.Tensor:
    directions = random_directions(8, 32, torch.Generator().manual_seed(3), torch.device("cpu"))
    projections = project(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    return view_loss(projections, 2) + SIGReg(17)(projections, directions)


def work(rank: int, folder: Path) -> None:
    """Be one rank: save the model's losses and averaged gradients, then those of only the view term and SIGReg."""
    torch.set_num_threads(1)
    model, inputs, project, features = torch.load(folder / "case.pt", weights_only=False).values()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results: dict[str, tuple] = {}
    ddp = DistributedDataParallel(model)  # kept in a variable: its hooks average the gradients
    losses = ddp(**part_of(inputs, rank))
    losses["loss"].backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    results["model"] = {key: value.detach() for key, value in losses.items()}, gradients
    mine = features.chunk(RANKS)[rank].clone().requires_grad_()
    loss = terms(project, mine)
    loss.backward()
    results["terms"] = loss.detach(), mine.grad / RANKS  # the gradient of the mean over the ranks
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def work_compiled(rank: int, folder: Path) -> None:
    """Be one rank: save the losses and averaged gradients of the model, eager and traced as one graph."""
    torch.set_num_threads(1)
    model, inputs, _, _ = torch.load(folder / "case.pt", weights_only=False).values()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    graphs, results = CompileCounterWithBackend("aot_eager"), []
    for is_compiled in (False, True):
        if is_compiled:
            model.compile(backend=graphs, fullgraph=True, dynamic=False)
        ddp = DistributedDataParallel(model)
        losses = ddp(**part_of(inputs, rank))
        losses["loss"].backward()
        gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.requires_grad}
        model.zero_grad()
        results.append({key: value.detach() for key, value in (losses | gradients).items()})
    assert graphs.frame_count == 1
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def case(make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict]) -> dict:
    """Return a case with every reduction: view, SIGReg, standardisation and whitening."""
    project, features = nn.Sequential(nn.Linear(12, 8), BatchStandardize(8)), torch.randn(16, 5, 12)
    inputs = make_inputs("global_with_local_context")
    return {"model": make_model(whiten_targets=True), "inputs": inputs, "project": project, "features": features}


@pytest.fixture(scope="module")
def ranks(case: dict, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    # Both ranks are forked from one process that has imported the model, which takes seconds. A fork server passes few file
    # descriptors, and every tensor would need one, so the case goes through a file.
    return run_ranks(work, case, folder)


def run_ranks(work: Callable[[int, Path], None], case: dict, folder: Path) -> list[dict]:
    torch.save(case, folder / "case.pt")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["model.hjepa"])
    multiprocessing.start_processes(work, (folder,), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
def test_a_step_of_two_ranks_is_one_graph_with_the_same_losses_and_gradients(case: dict, tmp_path: Path) -> None:
    for eager, compiled in run_ranks(work_compiled, case, tmp_path):
        assert eager.keys() == compiled.keys()
        assert [name for name in eager if not torch.equal(eager[name], compiled[name])] == []


def test_two_ranks_have_the_losses_and_gradients_of_one_on_the_joined_batch(case: dict, ranks: list[dict]) -> None:
    model = case["model"]
    whole = model(**case["inputs"])
    whole["loss"].backward()
    for key in ("loss", "level_0", "level_1", "level_2", "view", "sigreg"):
        mean = sum(rank["model"][0][key] for rank in ranks) / RANKS
        torch.testing.assert_close(mean, whole[key].detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ranks[0]["model"][0]["sigreg"], ranks[1]["model"][0]["sigreg"])
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            for rank in ranks:
                torch.testing.assert_close(
                    rank["model"][1][key], parameter.grad, atol=2e-6, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
                )


def test_view_and_sigreg_of_two_ranks_equal_one_in_value_and_gradient(case: dict, ranks: list[dict]) -> None:
    whole = case["features"].clone().requires_grad_()
    loss = terms(case["project"], whole)
    loss.backward()
    values, gradients = zip(*[rank["terms"] for rank in ranks], strict=True)
    torch.testing.assert_close(sum(values) / RANKS, loss.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(gradients), whole.grad, atol=1e-6, rtol=1e-4)
