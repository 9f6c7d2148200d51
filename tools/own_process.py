"""Work in a process of its own, so that no threads, allocator or peak memory but its own are measured."""

import ctypes
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, so that no orphan keeps writing (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def own_process(*preload: str) -> ProcessPoolExecutor:
    """One worker, forked from a server that has imported `preload` and has neither threads nor CUDA of the caller."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(1, context, initializer=die_with_parent)
