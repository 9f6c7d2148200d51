"""Subprocesses for work whose threads, allocator and peak memory must not mix with the caller's."""

import ctypes
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, so that no orphan keeps writing (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def isolated_executor(preload: str) -> ProcessPoolExecutor:
    """Return an executor of one worker, forked from a server that has imported `preload` but has no threads and no CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(1, context, initializer=die_with_parent)


def run_in_subprocess(function: Callable[..., T], *arguments: object) -> T:
    """Return `function(*arguments)`, computed in a subprocess of its own."""
    with isolated_executor(function.__module__) as worker:
        return worker.submit(function, *arguments).result()
