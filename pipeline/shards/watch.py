"""The tars of a folder, which must stay as they are while a run reads them."""

import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

log = logging.getLogger(__name__)
Result = TypeVar("Result")

POLL_S = 0.2
SPARE_FILES = 512  # for everything but shards: libraries, sockets, logs


class StoreError(OSError):
    """The storage does not give what the run needs, after all retries."""


class Cancelled(RuntimeError):
    """The wait for shards was cancelled."""


class FolderWatch:
    """Waits up to `retry_s` seconds for the tars at `paths`. Waits end with Cancelled soon after `cancelled()` or `closing`."""

    def __init__(self, paths: Sequence[Path], retry_s: float) -> None:
        self._paths, self._retry_s, self._stamps = paths, retry_s, [_stamp(os.stat(path)) for path in paths]
        self.cancelled: Callable[[], bool] = lambda: False
        self.closing = False

    def patiently(self, work: Callable[[], Result]) -> Result:
        """Return `work()`, tried again while it raises OSError. Raises StoreError when the time is over."""
        started, warned = time.monotonic(), False
        while True:
            try:
                return work()
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            if time.monotonic() - started >= self._retry_s:
                raise StoreError(f"{problem}, tried for {self._retry_s:g} s. Restore the shards as they were")
            if not warned:
                log.warning(f"{problem}; waiting up to {self._retry_s:g} s for it")
            warned = True
            if self.closing or self.cancelled():
                raise Cancelled
            time.sleep(POLL_S)

    def check(self, shards: np.ndarray) -> None:
        """Raise OSError if one of these tars cannot be read or was changed: its bytes then say nothing about its images."""
        for shard in np.unique(shards).tolist():
            with self._paths[shard].open("rb", buffering=0) as file:
                file.read(1)
                if _stamp(os.fstat(file.fileno())) != self._stamps[shard]:
                    raise StoreError(f"{self._paths[shard]}: changed since the run began")


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def allow_open_files(count: int) -> None:
    """Let this process open `count` files more than the usual few hundred. Raises ValueError if the system forbids it."""
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except ValueError:
            limit = f"the limit is {hard}: raise it (`ulimit -Hn`, LimitNOFILE)"
            raise ValueError(f"{needed} open files are needed, {limit}") from None
