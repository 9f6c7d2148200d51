"""A part of `bench.py gpu`: a function from the case to lines of figures, registered by a decorator."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.measure import reason

# What a measurement may raise without ending the others: a bug or a missing feature is a line of the table here.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`device`: `gpu`, or `cpu` for a rehearsal with small sizes. `seconds`: what a part's measurements may take together."""

    folder: Path
    device: str
    threads: int
    seconds: float = 60.0

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device == "gpu" else torch.device("cpu")


@dataclass(frozen=True)
class Line:
    """One row of the table: figures by their unit, or the reason why there are none."""

    what: str
    figures: dict[str, float] = field(default_factory=dict)
    error: str = ""
    part: str = ""

    @property
    def text(self) -> str:
        shown = ", ".join(f"{_shown(value)} {unit}" for unit, value in self.figures.items())
        return "; ".join(filter(None, [shown, f"FAILED: {self.error}" if self.error else ""]))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


Measurement = Callable[[Case], Iterable[Line]]


@dataclass(frozen=True)
class Part:
    """`weight`: its share of the time."""

    measure: Measurement
    weight: float


PARTS: dict[str, Part] = {}


def part(name: str, weight: float) -> Callable[[Measurement], Measurement]:
    """Register a function under `name`; parts run in the order of their registration."""

    def register(measure: Measurement) -> Measurement:
        PARTS[name] = Part(measure, weight)
        return measure

    return register


def attempt(what: str, measure: Callable[..., Iterable[Line]], *arguments: Any) -> Iterator[Line]:
    """The lines of a measurement, with one more for what it raised, so that the next measurement still runs."""
    try:
        yield from measure(*arguments)
    except FAILURES as error:
        yield Line(what, error=f"{type(error).__name__}: {reason(error)}"[:200])
