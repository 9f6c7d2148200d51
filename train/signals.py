"""The signals that end a run early."""

import logging
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)


class StopSignal:
    """While open, SIGINT, SIGTERM and SIGUSR1 only set `asked`; a second SIGINT, a second later or more, exits at once."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked:
            # Under torchrun, one Ctrl-C arrives twice: from the terminal, and forwarded.
            if number == signal.SIGINT and now - self._asked_at > 1:
                os._exit(128 + number)
            return
        self.asked, self._asked_at = True, now
        log.warning(f"{signal.Signals(number).name}: finishing the step and saving; Ctrl-C exits at once")

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
