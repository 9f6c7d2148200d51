"""Subprocesses for work whose threads, allocator and peak memory must not mix with the caller's."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent dies, so that no orphan keeps writing (prctl PR_SET_PDEATHSIG).

    `parent`: the process id of the parent, for a forked process. A parent that died before the request would go unnoticed.
    """
    ctypes.CDLL(None).prctl(1, number)
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


@contextmanager
def forked_workers(count: int, work: Callable[..., T]) -> Iterator[Callable[..., Future[T]]]:
    """Yield a function that has `work(*arguments)` done in one of `count` forked processes: `work` need not be picklable.

    Raises ValueError when a process was killed. At the end, what has not begun is given up.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start_worker, (os.getpid(), work))
    try:
        yield partial(pool.submit, _do_work)
    except BrokenProcessPool:
        raise ValueError("a worker was killed (out of memory?): run the same command with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_parallel(workers: int, work: Callable[..., T], *items: Iterable[Any]) -> Iterator[T]:
    """Yield `work(*item)` of all items, in their order: from forked processes, or here for one worker or one item."""
    each = list(zip(*items, strict=True))
    if workers == 1 or len(each) == 1:
        yield from (work(*item) for item in each)
        return
    with forked_workers(workers, work) as submit:
        yield from (future.result() for future in [submit(*item) for item in each])


def _start_worker(parent: int, work: Callable[..., Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent(parent)
    _WORK.append(work)


def _do_work(*item: Any) -> Any:
    return _WORK[-1](*item)
