"""Several processes that train one model: their ranks, what they agree on, and what ends them when one hangs."""

import datetime
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.command import BAD_INPUT, INTERRUPTED

LOST = 1  # exit code: another rank has died or hangs, or this one met a bug
CHECKPOINT_WRITER = "checkpoint writer"  # the thread that a failing rank waits for
WRITER_S = 20.0
# Ranks that stand in torch, most likely waiting for another rank, give up this much later: the one that hangs speaks first.
PATIENCE_S = 5.0
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
    """Connect the ranks while open: GPUs through NCCL, CPUs through gloo. A rank that fails says so with its name, and ends.

    It leaves the group open: to close it, NCCL waits for collectives that a failed rank will never join.
    """
    if ranks.world_size == 1:
        yield
        return
    backend, bound_to = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=bound_to)
    processes = torch.zeros(ranks.world_size, 2, dtype=torch.int64)
    processes[ranks.rank] = torch.tensor([_machine(), os.getpid()])
    dist.all_reduce(processes)
    try:
        yield
    except BaseException as error:  # noqa: BLE001  # whatever it is: the others must not wait for this rank
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends to all as soon as one has ended
        reason, code = str(error), BAD_INPUT
        if isinstance(error, KeyboardInterrupt):
            reason, code = "interrupted", INTERRUPTED
        elif not isinstance(error, (ValueError, OSError)):
            is_lost = isinstance(error, dist.DistError) or "gloo" in reason
            reason, code = _lost_ranks(processes.tolist()) if is_lost else f"{type(error).__name__}: {error}", LOST
            reason += f"\n{traceback.format_exc()}"
        _say(ranks, reason)
        leave(code)
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process at once, after the checkpoint that it is writing, without a word to the other ranks."""
    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_WRITER:
            thread.join(WRITER_S)
    with suppress(OSError, ValueError):  # a closed terminal
        sys.stdout.flush()
    os._exit(code)


def _say(ranks: Ranks, text: str) -> None:
    with suppress(OSError, ValueError):
        print(f"rank {ranks.rank} of {ranks.world_size}: {text}", file=sys.stderr, flush=True)


def _machine() -> int:
    return zlib.crc32(socket.gethostname().encode())


def _lost_ranks(processes: list[list[int]]) -> str:
    """Return which processes of this machine are gone, from a `(machine, pid)` for each rank."""
    for _ in range(20):  # a process that dies closes its connections a moment before it is gone
        pids = {rank: pid for rank, (machine, pid) in enumerate(processes) if machine == _machine()}
        if gone := [f"rank {rank} (process {pid})" for rank, pid in pids.items() if not _is_alive(pid)]:
            return f"lost {', '.join(gone)}"
        time.sleep(0.05)
    return "lost the connection to another rank, which says why"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


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
    """While open, ends a rank with its name and the stacks of its threads when no `beat` comes for `timeout_s` seconds.

    When one of several ranks hangs, all of them stand still, and each shows where. A single process is not watched.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._ranks, self._timeout_s, self._deadline = ranks, timeout_s, math.inf
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        self._deadline = time.monotonic() + self._timeout_s

    def pause(self) -> None:
        """Expect no beat for now: the next one starts the timeout again."""
        self._deadline = math.inf

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            # This thread cannot run while a call in C keeps the interpreter's lock: then only the stacks are shown.
            faulthandler.dump_traceback_later(self._timeout_s + 2 * PATIENCE_S, exit=True)
            late_s = time.monotonic() - self._deadline
            if late_s < 0 or (main := threading.main_thread().ident) is None:
                continue
            code = sys._current_frames()[main].f_code
            if late_s > (PATIENCE_S if "/torch/" in code.co_filename else 0):
                limit = f"no step for {self._timeout_s:g} s (training.timeout_s)"
                _say(self._ranks, f"{limit}; it stands in {code.co_name} of {code.co_filename}")
                faulthandler.dump_traceback()
                leave(LOST)
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        if self._ranks.world_size > 1:
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
