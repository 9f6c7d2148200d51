"""What a check of the doctor is: a small function from the case to a finding, listed by a decorator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.config.schema import Config

LOCKED = "pip install --require-hashes -r requirements.lock"


@dataclass(frozen=True)
class Case:
    """What is to run here. `data`: folder or s3:// prefix of the shards; `out`: folder of the runs; None: not given."""

    config: Config | None = None
    data: str | None = None
    out: Path = Path("runs")

    @property
    def needs_gpu(self) -> bool:
        return self.config is not None and self.config.device == "gpu"


@dataclass(frozen=True)
class Finding:
    """`fix`: the line that mends it, "" where nothing is to be done."""

    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


Check = Callable[[Case], Finding]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """List a function under `name`; checks run in the order in which they are listed."""

    def listed(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return listed


def ok(text: str) -> Finding:
    return Finding("ok", text)


def warn(text: str, fix: str) -> Finding:
    return Finding("warn", text, fix)


def fail(text: str, fix: str) -> Finding:
    return Finding("fail", text, fix)


def skipped(reason: str) -> Finding:
    return Finding("ok", f"skipped: {reason}")


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def examine(function: Check, case: Case) -> Finding:
    """The finding of one check; what it raised is a finding too, so that one fault does not hide the others."""
    try:
        return function(case)
    except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return fail(f"could not be checked: {lines[0][:300]}", f"mend the failures above first, then: {LOCKED}")
