"""Which reader settings are fastest here, by trying a few: for a GPU, where a wrong number of threads makes it wait."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.loader import MultiCropLoader

WARM_BATCHES, LEAST_BATCHES = 3, 4
NEAR = 0.97  # of the best rate: the fewest threads that reach it are chosen


@dataclass(frozen=True, order=True)
class ReaderSettings:
    """`num_threads` of DALI on the CPU, and the share of the JPEGs that the GPU's own engine decodes, where it has one."""

    num_threads: int
    hw_decoder_load: float


def candidates(cores: int, hw_decoder_load: float | None = None) -> list[ReaderSettings]:
    """A few settings for a rank that may use `cores` cores; a given `hw_decoder_load` is kept."""
    threads = sorted({max(1, cores // 4), max(1, cores // 2), max(1, cores - 1)})
    loads = (0.5, 0.8) if hw_decoder_load is None else (hw_decoder_load,)
    return [ReaderSettings(count, load) for count in threads for load in loads]


def tune(
    make_loader: Callable[[ReaderSettings], MultiCropLoader], settings: list[ReaderSettings], seconds: float = 1.0
) -> tuple[ReaderSettings, dict[ReaderSettings, float]]:
    """Measure a fresh loader of each of the settings for about `seconds`; the choice, and all rates in images/s."""
    rates = {each: measure(make_loader(each), seconds) for each in settings}
    return choose(rates), rates


def choose(rates: dict[ReaderSettings, float]) -> ReaderSettings:
    """The fewest threads among those near the best rate, and of these the fastest."""
    best = max(rates.values())
    near = [each for each, rate in rates.items() if rate >= NEAR * best]
    fewest = min(each.num_threads for each in near)
    return max((each for each in near if each.num_threads == fewest), key=lambda each: rates[each])


def measure(loader: MultiCropLoader, seconds: float) -> float:
    """Images per second of a loader that nobody else keeps waiting, start-up excluded."""
    images, batches, started = 0, 0, 0.0
    while True:
        for batch in loader:
            batches += 1
            if batches <= WARM_BATCHES:
                started = _now()
                continue
            images += len(batch.labels)
            if batches >= WARM_BATCHES + LEAST_BATCHES and (elapsed := _now() - started) >= seconds:
                return images / elapsed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
