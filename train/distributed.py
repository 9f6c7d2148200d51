"""Several processes that train one model: their ranks, what they agree on, and what ends them when one hangs."""

import datetime
import faulthandler
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Collectives must not time out while the other ranks wait for rank 0's evaluation. The watchdog detects hangs.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among all, and among those of its machine, as torchrun numbers them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """Return this rank's device; `kind` is gpu or cpu."""
        return torch.device("cuda", self.local_rank) if kind == "gpu" else torch.device("cpu")

    def all(self, flag: bool) -> bool:
        """Return True, on all ranks, if the flag is set on each of them. Waits for the slowest rank, not for the device."""
        return bool(self._reduce(int(flag), dist.ReduceOp.MIN))

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all(True)

    def from_first(self, number: int) -> int:
        """Return rank 0's number on all ranks."""
        return self._reduce(number if self.is_first else 0, dist.ReduceOp.SUM)

    def _reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        if self.world_size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, operation)  # a CPU tensor: gloo reduces it, without the GPU
        return int(value)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise mean over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size


SINGLE_PROCESS = Ranks()


def ranks_from_environment() -> Ranks:
    """Return what torchrun has set; without it, a single process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Ranks(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))


def use_device(ranks: Ranks, kind: str) -> torch.device:
    """Make this rank's device, of `kind` gpu or cpu, torch's current one. Raises ValueError for more ranks than GPUs."""
    if kind == "gpu":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(
                "device: gpu, but torch sees no GPU here. Use device=auto or device=cpu; `python tools/doctor.py` says why"
            )
        if ranks.local_world_size > count:
            raise ValueError(
                f"torchrun: {ranks.local_world_size} ranks on this machine, which has {count} GPUs. Use --nproc_per_node={count}"
            )
        torch.cuda.set_device(ranks.local_rank)
    return ranks.device(kind)


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the ranks while open: GPUs through NCCL, CPUs through gloo."""
    if ranks.world_size == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return `model` with gradients averaged over the ranks; for a single process, the model itself."""
    if ranks.world_size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers, 2.11 knows no other name
        # The buffers are constants. Every parameter has a gradient under every strategy, so DDP need not search for some.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync_if(condition: bool, replica: nn.Module) -> AbstractContextManager[Any]:
    """Keep the gradients of a pass on this rank if `condition`: those of a later pass are averaged together with them."""
    return replica.no_sync() if condition and isinstance(replica, DistributedDataParallel) else nullcontext()


class Watchdog:
    """While open, ends a rank and dumps the stacks of its threads when no `beat` comes for `timeout_s` seconds.

    When one of several ranks hangs, all of them stand still, and each shows where. A single process is not watched.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._ranks, self._timeout_s = ranks, timeout_s

    def beat(self) -> None:
        if self._ranks.world_size > 1:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)

    def pause(self) -> None:
        """Expect no beat for now: the next one starts the timeout again."""
        if self._ranks.world_size > 1:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        if self._ranks.world_size > 1:  # the dump itself names neither the rank nor the setting
            limit = f"{self._timeout_s:g} s without a step (training.timeout_s)"
            print(f"rank {self._ranks.rank}, process {os.getpid()}: ends with its stacks after {limit}", file=sys.stderr)
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
