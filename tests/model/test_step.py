"""The step as a computation: static, without host syncs, compiled, checkpointed."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from model import MultiCropMaskGenerator
from model.hjepa import HJEPA
from model.losses import random_directions
from model.masks import STRATEGIES

Maker = Callable[..., HJEPA]
Inputs = Callable[..., dict]

# Operators that make the host wait for the device, to learn a value or a shape.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")


class Recorder(TorchDispatchMode):
    """Records the names of all operators that run and refuses boolean indices, which hide a `nonzero`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def take_step(model: HJEPA, inputs: dict, strategy: str, device: str = "cpu") -> None:
    """Run everything from the crops to the updated target, as the training loop does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    plan = MultiCropMaskGenerator(strategy, 2, 4, grid=6, local_grid=2, device=device)(6)
    directions = random_directions(16, 8, torch.Generator(device), torch.device(device))
    losses = model(inputs["crops"], inputs["boxes"], inputs["flips"], plan, directions)
    losses["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.update_target(0.99)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_runs_no_operator_that_waits_for_the_device(make_model: Maker, make_inputs: Inputs, strategy: str) -> None:
    model, inputs = make_model(), make_inputs(strategy)
    with Recorder() as recorder:
        take_step(model, inputs, strategy)
    assert "mm" in recorder.names
    assert "_foreach_mul_" in recorder.names
    assert not recorder.names & set(WAITING)


def test_the_recorder_notices_an_item_and_a_boolean_index() -> None:
    with Recorder() as recorder:
        torch.ones(()).item()
        torch.ones(3).nonzero()
    assert {"_local_scalar_dense", "nonzero"} <= recorder.names
    with pytest.raises(AssertionError), Recorder():
        torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_never_waits_for_the_gpu(make_model: Maker, make_inputs: Inputs, strategy: str) -> None:
    model, inputs = make_model().cuda(), make_inputs(strategy)
    moved = {name: inputs[name].cuda() for name in ("boxes", "flips")} | {"crops": [c.cuda() for c in inputs["crops"]]}
    take_step(model, moved, strategy, "cuda")  # the first step initialises libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(model, moved, strategy, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Tracing takes seconds: by default only the strategy with padding and partners, which meets every branch.
@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[pytest.mark.slow] * (name != "cross_crop_prediction")) for name in STRATEGIES]
)
def test_the_step_is_one_graph_compiled_once_and_normalises_bytes_in_it(
    make_model: Maker, make_inputs: Inputs, strategy: str
) -> None:
    torch._dynamo.reset()
    plain, compiled, counter = make_model(), make_model(), CompileCounter()
    compiled.compile(backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        inputs = make_inputs(strategy, seed=seed)
        inputs["crops"] = [
            torch.randint_like(crop, 256).byte().contiguous(memory_format=torch.channels_last) for crop in inputs["crops"]
        ]
        expected, losses = plain(**inputs), compiled(**inputs)
        assert losses.keys() == expected.keys()
        for name, value in losses.items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointing_changes_neither_losses_nor_gradients_and_keeps_less(
    make_model: Maker, make_inputs: Inputs, strategy: str
) -> None:
    inputs, kept, results = make_inputs(strategy), [], []
    for checkpointing in (False, True):
        model, sizes = make_model(grad_checkpointing=checkpointing), {}

        def keep(tensor: torch.Tensor, sizes: dict = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(**inputs)
        kept.append(sum(sizes.values()))
        losses["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([losses["loss"].detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], atol=1e-7, rtol=1e-5)
    assert kept[1] < 0.6 * kept[0]
