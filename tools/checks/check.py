"""A check of the doctor: a function from a case to a finding. `tools/doctor.py` lists all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from train.config.schema import Config

INSTALL = "pip install --require-hashes -r requirements.lock"
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A run to prepare for. `data` is the folder of the shards, or their prefix in a store; `out` is the folder of the runs."""

    config: Config | None = None
    data: str | None = None
    out: Path = Path("runs")

    @property
    def device(self) -> str:
        return "" if self.config is None else self.config.device


@dataclass(frozen=True)
class Finding:
    """`skip`: there is nothing to check here. `fix` is a suggestion, "" if there is nothing to do."""

    status: Literal["ok", "warn", "fail", "skip"]
    text: str
    fix: str = ""


Check = Callable[[Case], Finding]
ok, warn, fail, skip = (partial(Finding, status) for status in ("ok", "warn", "fail", "skip"))


def examine(check: Check, case: Case) -> Finding:
    """Return the finding of a check. An exception is a failure, so that one problem does not hide the others."""
    try:
        return check(case)
    except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
        return failure(error, f"fix the failures above first, then: {INSTALL}")


def failure(error: Exception, fix: str) -> Finding:
    return fail((str(error).strip() or type(error).__name__).splitlines()[0], fix)
