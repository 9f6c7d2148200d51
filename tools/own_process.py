"""Subprocesses for work whose threads, allocator and peak memory must not mix with the caller's."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")


def die_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process when its parent dies, so that no orphan keeps writing (prctl PR_SET_PDEATHSIG).

    `parent`: the process id of the parent, for a forked process. A parent that died before the request would go unnoticed.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def isolated_executor(*preload: str) -> ProcessPoolExecutor:
    """Return an executor of one worker, forked from a server that has imported `preload` but has no threads and no CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(1, context, initializer=die_with_parent)


def run_in_subprocess(function: Callable[..., T], *arguments: object) -> T:
    """Return `function(*arguments)`, computed in a subprocess of its own."""
    with isolated_executor(function.__module__) as worker:
        return worker.submit(function, *arguments).result()


_WORK: list[Callable[..., Any]] = []  # set once in each forked worker


def in_parallel(workers: int, work: Callable[..., T], *items: Iterable[Any]) -> Iterator[T]:
    """Yield `work(*item)` of all items, in their order, from forked processes: `work` may hold what cannot be pickled.

    Raises ValueError when a process was killed.
    """
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, start_worker, (os.getpid(), _WORK.append, work))
    try:
        yield from pool.map(_do_work, *items)
    except BrokenProcessPool:
        raise ValueError("a worker was killed (out of memory?): run the same command with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker(parent: int, keep: Callable[[Any], None], work: Any) -> None:
    """Prepare a forked worker: it keeps `work`, leaves Ctrl-C to its parent and dies with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    keep(work)


def _do_work(*item: Any) -> Any:
    return _WORK[-1](*item)
