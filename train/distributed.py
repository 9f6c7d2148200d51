"""Several processes that train one model: this one's rank, what they agree on, and what ends them when one hangs."""

import datetime
import faulthandler
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Rank 0 evaluates alone while the others wait for it; the watchdog knows about that, and detects hangs.
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among all, and among those of its machine. torchrun sets them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """`kind`: gpu or cpu."""
        return torch.device("cuda", self.local_rank) if kind == "gpu" else torch.device("cpu")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: the same answer on all. Waits for the slowest rank, not for the device."""
        return bool(self._agree(int(flag), dist.ReduceOp.MAX))

    def from_first(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        return self._agree(number if self.is_first else 0, dist.ReduceOp.SUM)

    def _agree(self, number: int, by: dist.ReduceOp.RedOpType) -> int:
        if self.world_size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, by)  # on the CPU, by gloo
        return int(value)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks, elementwise."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size


def ranks_from_environment() -> Ranks:
    """A single process unless torchrun says otherwise."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Ranks(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))


def use_device(ranks: Ranks, kind: str) -> torch.device:
    """This rank's device, of `kind` gpu or cpu, made torch's current one. ValueError for more ranks than GPUs."""
    if kind == "gpu":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(
                "device: gpu, but torch sees no GPU here. Use device=auto or device=cpu; `python tools/doctor.py` says why"
            )
        if ranks.local_world_size > count:
            raise ValueError(
                f"torchrun: {ranks.local_world_size} ranks on this machine, which has {count} GPUs. "
                f"Use --nproc_per_node={count}"
            )
        torch.cuda.set_device(ranks.local_rank)
    return ranks.device(kind)


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """While open, the ranks can communicate: by NCCL between GPUs, by gloo between CPUs."""
    if ranks.world_size == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """`model` with gradients averaged over the ranks; for a single process, the model itself."""
    if ranks.world_size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers, 2.11 knows no other name
        # The buffers are constants. Every parameter has a gradient under every strategy, so none is searched for.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def gradients_kept_back(replica: nn.Module, kept: bool) -> AbstractContextManager[Any]:
    """While open, and if `kept`, gradients stay on this rank, to be averaged together with those of a later batch."""
    return replica.no_sync() if kept and isinstance(replica, DistributedDataParallel) else nullcontext()


class Watchdog:
    """While open, ends the process and prints the stack of its threads when no `beat` has come for `timeout_s`.

    Only on several ranks: when one hangs, all of them stand still, and each shows where. A single process is left to its user.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._name, self._timeout_s, self._needed = f"rank {ranks.rank}", timeout_s, ranks.world_size > 1
        self._last: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self) -> None:
        """The run makes progress."""
        self._last = time.monotonic()

    def rest(self) -> None:
        """What follows may take long, until the next beat."""
        self._last = None

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            last = self._last
            if last is not None and time.monotonic() - last > self._timeout_s:
                print(
                    f"{self._name}: no step for {self._timeout_s:g} s (training.timeout_s); it stands at:",
                    file=sys.stderr,
                )
                sys.stderr.flush()
                faulthandler.dump_traceback()
                os._exit(1)
            # Should the interpreter itself be stuck, this one fires without it.
            faulthandler.dump_traceback_later(2 * self._timeout_s, exit=True)

    def __enter__(self) -> Self:
        self.beat()
        if self._needed:
            self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._needed:
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
