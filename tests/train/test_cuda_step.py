"""The training step on a GPU that is not there: fake tensors refuse mixed devices, and every operation that waits is named.

torch's autograd engine runs backward passes on a GPU only where there is one. So forward pass, clipping, guard, optimiser and
target update run on fake CUDA tensors, with gradients put in by hand, and the same step with its backward pass on fake CPU
tensors: what it reads from a tensor there, it would wait for on a GPU.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.hjepa import HJEPA
from model.masks import STRATEGIES
from pipeline.dataset import CropBatch
from tests.train.test_run import QUICKSTART, command
from train.build import build_masks, build_model, crop_sizes
from train.config.load import load_config
from train.config.schema import Config
from train.distributed import Ranks
from train.trainer import Trainer

CUDA = torch.device("cuda", 0)
HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}


class Waits(TorchDispatchMode):
    """While open, notes each operation that reads a tensor's values on the host, or copies between devices and waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.count += 1
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        masked = name.startswith("index") and any(index is not None and index.dtype == torch.bool for index in _indices(args))
        if name in HOST_READS or masked:
            self.seen.append(name)
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", False):
            source, target = tensors[-1].device.type, out.device.type
            if source != target:
                self.seen.append(f"{name} {source} -> {target}")
        return out


def _indices(args: Any) -> list[torch.Tensor | None]:
    return [index for value in args[1:2] if isinstance(value, (list, tuple)) for index in value]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what torch needs a GPU for, except its kernels: a generator, autocast's check, and the backward pass."""

    def backward(loss: torch.Tensor) -> None:
        assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())
        for parameter in parameters_of(loss):
            parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad + 0

    plain = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": plain())
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "backward", backward)


def parameters_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """The leaves of its graph."""
    found, nodes = {}, {loss.grad_fn}
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        new = {child for child, _ in node.next_functions if child is not None} - nodes
        nodes |= new
        queue += new
    return list(found.values())


def moved(model: HJEPA, device: torch.device) -> HJEPA:
    """The same module with fake parameters and buffers on the device."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return model


@dataclass(frozen=True)
class OneRank(Ranks):
    """A single process on a device of the test's choice."""

    chosen: torch.device = CUDA

    def device(self, kind: str) -> torch.device:
        return self.chosen


def fake_batch(config: Config, device: torch.device) -> CropBatch:
    sizes, count = crop_sizes(config), config.data.batch_size
    crops = [torch.empty(count, 3, size, size, dtype=torch.uint8, device=device) for size in sizes]
    boxes = torch.empty(count, len(sizes), 4, device=device)
    flips = torch.empty(count, len(sizes), dtype=torch.bool, device=device)
    numbers = torch.empty(count, dtype=torch.int64, device=device)
    return CropBatch(crops, numbers, boxes, flips, numbers)


def take_steps(strategy: str, device: torch.device, data_path: Path) -> tuple[Waits, dict[str, torch.Tensor]]:
    """Take two steps of two batches each on fake tensors. Returns what they waited for, and every tensor that they leave."""
    changes = [f"masking.strategy={strategy}", f"loss.whiten_targets={str(strategy != 'global_only').lower()}"]
    changes += ["training.accumulation_steps=2", "training.optimizer=muon"]
    path, *overrides = command(QUICKSTART, data_path, data_path, *changes, "logging.log_frequency=1000")
    config = load_config(Path(path), overrides)
    real = build_model(config, torch.device("cpu"))
    with FakeTensorMode():
        trainer = Trainer(config, OneRank(chosen=device), model=moved(real, device))
        trainer._batches = repeat(fake_batch(config, device))
        trainer.state.step = 1  # the first step is read
        with Waits() as waits:
            for _ in range(2):
                assert trainer.train_step() == {}
        left = {**dict(trainer.model.named_parameters()), **trainer.monitor._sums, "skipped": trainer.monitor._skipped}
        for name, parameter in trainer.model.named_parameters():
            left |= {f"{name}/{key}": value for key, value in trainer.optimizer.state[parameter].items()}
        with Waits() as reading, pytest.raises(DataDependentOutputException):
            trainer.monitor.read_counts()
        assert reading.seen == ["_local_scalar_dense"]  # only a logging step waits
    return waits, left


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("pretended_gpu")
def test_a_step_stays_on_the_gpu_and_never_waits_for_it(strategy: str, data_path: Path) -> None:
    waits, left = take_steps(strategy, CUDA, data_path)
    assert waits.seen == []
    assert waits.count > 500
    assert {name: tensor.device for name, tensor in left.items() if tensor.device != CUDA} == {}
    assert any(name.startswith("predictor") and name.endswith("/exp_avg_sq") for name in left)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_backward_pass_reads_no_values_and_reaches_every_parameter(strategy: str, data_path: Path) -> None:
    waits, left = take_steps(strategy, torch.device("cpu"), data_path)
    assert waits.seen == []
    trained = [name for name, tensor in left.items() if tensor.requires_grad]
    assert [name for name in trained if not {f"{name}/exp_avg", f"{name}/momentum"} & left.keys()] == []
    assert {name.rpartition("/")[2] for name in left if "/" in name} >= {"exp_avg", "exp_avg_sq", "momentum"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("pretended_gpu")
def test_a_forward_pass_is_one_graph_of_gpu_tensors_alone_as_a_cuda_graph_must_be(strategy: str, data_path: Path) -> None:
    settings = (f"masking.strategy={strategy}", f"loss.whiten_targets={str(strategy != 'global_only').lower()}")
    path, *overrides = command(QUICKSTART, data_path, data_path, *settings)
    config, graphs = load_config(Path(path), overrides), []
    real = build_model(config, torch.device("cpu"))

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        values = [value for node in graph.graph.nodes for value in tree_leaves(node.meta.get("val"))]
        graphs.append([value.device for value in values if isinstance(value, torch.Tensor)])
        return graph.forward

    with FakeTensorMode():
        model = moved(real, CUDA)
        plan, batch = build_masks(config, model, CUDA)(config.data.batch_size), fake_batch(config, CUDA)
        directions = torch.empty(config.model.projector_dim, config.loss.sigreg_slices, device=CUDA)
        model.compile(backend=aot_autograd(fw_compiler=note, inference_compiler=note), fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():  # its backward pass needs a GPU
            model(batch.crops, batch.boxes, batch.flips, plan, directions)
    (devices,) = graphs
    assert set(devices) == {CUDA}
    assert len(devices) > 500


@pytest.mark.parametrize(
    ("waits_for", "operation"),
    [
        ("_to_copy cuda -> cpu", lambda x: x.cpu()),
        ("_to_copy cpu -> cuda", lambda x: torch.tensor(1.0, device=x.device)),
        ("copy_ cpu -> cuda", lambda x: x.copy_(torch.ones(4))),
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.sum() > 0)),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
    ],
)
def test_each_way_to_wait_is_noticed(waits_for: str, operation: Callable[[torch.Tensor], Any]) -> None:
    with FakeTensorMode():
        x = torch.empty(4, device=CUDA)
        with Waits() as waits, suppress(DataDependentOutputException, DynamicOutputShapeException):
            operation(x)
    assert waits.seen[0] == waits_for


def test_mixed_devices_are_refused() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.empty(4, device=CUDA) + torch.empty(4)
