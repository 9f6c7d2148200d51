"""Which reader settings are fastest here, by trying a few: for a GPU, which waits when they are wrong."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from nvidia.dali import backend

from pipeline.batch import CropBatch
from pipeline.crops.device import DeviceError
from pipeline.loader import MultiCropLoader

WARM_BATCHES, LEAST_BATCHES = 3, 4
NEAR = 0.97  # of the best rate: the fewest threads that reach it are chosen
Step = Callable[[CropBatch], object]

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class ReaderSettings:
    """`num_threads` of DALI on the CPU, the share of the JPEGs that the GPU's own engine decodes, where it has one, and the
    `crop_device`, of a run whose device is a GPU."""

    num_threads: int
    hw_decoder_load: float
    crop_device: str = "gpu"


def candidates(
    cores: int, hw_decoder_load: float | None = None, crop_devices: tuple[str, ...] = ("gpu",)
) -> list[ReaderSettings]:
    """A few settings for a rank that may use `cores` cores; a given `hw_decoder_load` is kept."""
    threads = sorted({max(1, cores // 4), max(1, cores // 2), max(1, cores - 1)})
    loads = {"gpu": (0.5, 0.8) if hw_decoder_load is None else (hw_decoder_load,), "cpu": (0.0,)}
    return [
        ReaderSettings(count, load, device) for device in crop_devices for count in threads for load in loads[device]
    ]


def tune(
    make_loader: Callable[[ReaderSettings], MultiCropLoader],
    settings: list[ReaderSettings],
    seconds: float = 1.0,
    step: Step | None = None,
) -> tuple[ReaderSettings, dict[ReaderSettings, float]]:
    """Measure a fresh loader of each of the settings for about `seconds`; the choice, and all rates in images/s.

    `step`: a training step, so that the rates are those of the whole and not of the loader alone. A `crop_device` that does not
    work, or for which there is no memory, is reported and left out.

    Raises DeviceError or torch.OutOfMemoryError when that leaves none.
    """
    rates: dict[ReaderSettings, float] = {}
    failed: dict[str, Exception] = {}
    for each in settings:
        if each.crop_device not in failed:
            try:
                rates[each] = _rate_of(make_loader(each), seconds, step)
            except (DeviceError, torch.OutOfMemoryError) as error:
                failed[each.crop_device] = type(error)(str(error))  # itself it would keep the graph alive
            free_unused_memory()
    rates = {each: rate for each, rate in rates.items() if each.crop_device not in failed}
    if not rates:
        raise next(iter(failed.values()))
    chosen = choose(rates)
    for device, reason in failed.items():
        log.warning("crops are made on the %s, not on the %s: %s", chosen.crop_device, device, reason)
    best = {
        device: max(rate for each, rate in rates.items() if each.crop_device == device) for device in _devices(rates)
    }
    if len(best) > 1:
        listed = ", ".join(f"{device} {rate:,.0f} images/s" for device, rate in best.items())
        log.info("crops are made on the %s: %s", chosen.crop_device, listed)
    return chosen, rates


def _devices(rates: dict[ReaderSettings, float]) -> list[str]:
    return list(dict.fromkeys(each.crop_device for each in rates))


def choose(rates: dict[ReaderSettings, float]) -> ReaderSettings:
    """Of the fastest crop device: the fewest threads among those near the best rate, and of these the fastest."""
    fastest = max(rates, key=lambda each: rates[each])
    near = [
        each
        for each, rate in rates.items()
        if each.crop_device == fastest.crop_device and rate >= NEAR * rates[fastest]
    ]
    fewest = min(each.num_threads for each in near)
    return max((each for each in near if each.num_threads == fewest), key=lambda each: rates[each])


def _rate_of(loader: MultiCropLoader, seconds: float, step: Step | None) -> float:
    try:
        return measure(loader, seconds, step)
    finally:
        loader.close()


def measure(loader: MultiCropLoader, seconds: float, step: Step | None = None) -> float:
    """Images per second of a loader and, where one is given, a training step that takes its batches; start-up excluded."""
    images, started = 0, 0.0
    for number, batch in enumerate(chain.from_iterable(repeat(loader)), 1):
        if step is not None:
            step(batch)
        if number == WARM_BATCHES:
            started = _now()
        if number <= WARM_BATCHES:
            continue
        images += len(batch.labels)
        if number >= WARM_BATCHES + LEAST_BATCHES and time.perf_counter() - started >= seconds:
            break
    return images / (_now() - started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def free_unused_memory() -> None:
    """What graphs that are gone have left in the pools of DALI."""
    gc.collect()
    if torch.cuda.is_available():
        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]
