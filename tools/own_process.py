"""Subprocesses for work whose threads, allocator and peak memory must not mix with the caller's."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def die_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process when its parent dies, so that no orphan keeps writing (prctl PR_SET_PDEATHSIG).

    `parent`: the process id of the parent, for a forked process. A parent that died before the request would go unnoticed.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def isolated_executor(preload: str) -> ProcessPoolExecutor:
    """Return an executor of one worker, forked from a server that has imported `preload` but has no threads and no CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(1, context, initializer=die_with_parent)


def run_in_subprocess(function: Callable[..., T], *arguments: object) -> T:
    """Return `function(*arguments)`, computed in a subprocess of its own."""
    with isolated_executor(function.__module__) as worker:
        return worker.submit(function, *arguments).result()
