"""A check of the doctor: a small function from the case to a finding, registered by a decorator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from train.config.schema import Config

LOCKED = "pip install --require-hashes -r requirements.lock"


@dataclass(frozen=True)
class Case:
    """What is to run here. `data`: folder, or prefix in a store, of the shards; `out`: folder of the runs; None: not given."""

    config: Config | None = None
    data: str | None = None
    out: Path = Path("runs")

    @property
    def needs_gpu(self) -> bool:
        return self.config is not None and self.config.device == "gpu"

    @property
    def compiles(self) -> bool:
        return self.config is not None and self.config.training.compile


@dataclass(frozen=True)
class Finding:
    """`fix`: a suggested fix, "" where nothing is to be done."""

    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


Check = Callable[[Case], Finding]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a function under `name`; checks run in the order of their registration."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


ok, warn, fail = (partial(Finding, status) for status in ("ok", "warn", "fail"))


def skipped(reason: str) -> Finding:
    return ok(f"skipped: {reason}")


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def examine(function: Check, case: Case) -> Finding:
    """The finding of one check. What it raises is a finding too, so that one fault does not hide the others."""
    try:
        return function(case)
    except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return fail(f"could not be checked: {lines[0][:300]}", f"fix the failures above first, then: {LOCKED}")
