"""Work in a process of its own, so that no threads, allocator or peak memory but its own are measured."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from tools.shards.convert import die_with_parent


def own_process(*preload: str) -> ProcessPoolExecutor:
    """One worker, forked from a server that has imported `preload` and has neither threads nor CUDA of the caller."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(1, context, initializer=die_with_parent)
