"""A run's folder and the signals that end a run early."""

import json
import logging
import os
import platform
import signal
import time
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import nvidia.dali
import torch
import yaml

from pipeline.files import write_atomic
from train.checkpoint import data_of, list_checkpoints
from train.config.changes import changed_settings, flatten
from train.config.schema import Config

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "numpy", "multicrop-hjepa")
# What may differ between a run and its continuation: the rest decides what the weights mean.
FREE_SECTIONS = ("device", "training.", "checkpoint.", "logging.", "evaluation.")
FREE_KEYS = (
    *FREE_SECTIONS,
    "data.data_path",
    "data.cache_dir",
    "data.cache_size_gb",
    "data.store_streams",
    "data.store_retry_s",
    "data.batch_size",
    "data.num_workers",
    "data.prefetch",
    "data.crop_device",
    "data.pin_memory",
    "data.use_mmap",
    "data.hw_decoder_load",
    "data.max_bad_share",
)


def run_folder(config: Config) -> Path:
    return Path(config.logging.run_dir) / config.logging.run_name


def open_run_folder(config: Config, data: str | None = None) -> Path:
    """Make `run_dir/run_name` with its config.yaml and environment.json. `data`: the digest of the training shards.

    With `resume: none` an earlier run's checkpoints are moved aside. Otherwise a folder of a run with other settings or data
    raises ValueError, which lists them; so does a folder that cannot be written.
    """
    check_run_folder(config, data)
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.checkpoint.resume == "none":
            _move_aside(folder)
        write_atomic(folder / "config.yaml", config.to_yaml())
        write_atomic(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror}); free some space, or choose another logging.run_dir"
        ) from None
    return folder


def check_run_folder(config: Config, data: str | None = None) -> None:
    """Raise ValueError if the run's folder holds a run with other settings or on other data that this one would continue."""
    folder = run_folder(config)
    settings = folder / "config.yaml"
    if config.checkpoint.resume == "none" or not (folder / "checkpoints").exists():
        return
    before = read_settings(settings) if settings.exists() else {}
    if before and (changes := changed_settings(before, config.resolved, FREE_KEYS)):
        raise ValueError(
            f"{folder}: holds a run with other settings ({'; '.join(changes)}). Choose another logging.run_name, or "
            "checkpoint.resume=none to start over"
        )
    known = [digest for path in list_checkpoints(folder / "checkpoints") if (digest := data_of(path))]
    if data and known and known[-1] != data:
        path, now = flatten(before).get("data.data_path"), str(config.data.data_path)
        moved = f"data.data_path was {path}, is {now}" if str(path) != now else f"{now} has changed since"
        raise ValueError(
            f"{folder}: holds a run that was trained on other images ({moved}). Give the old ones with data.data_path, choose "
            "another logging.run_name, or checkpoint.resume=none to start over"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that holds no settings."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        content = str(error).splitlines()[0]
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path}: damaged, no settings ({content or 'the file is empty'}), so this run cannot be compared with them. Remove "
            "it to continue with the settings of this command; checkpoint.resume=none starts over"
        )
    return content


def _move_aside(folder: Path) -> None:
    for name in ("checkpoints", "metrics.jsonl", "summary.json", "baselines.json"):
        if (folder / name).exists():
            number = 1
            while (folder / f"{name}.old-{number}").exists():
                number += 1
            (folder / name).rename(folder / f"{name}.old-{number}")
            log.info(f"{folder / name}: from an earlier run, moved to {name}.old-{number}")


def environment() -> dict[str, Any]:
    """What a run's results depend on besides its settings."""
    return {
        "python": platform.python_version(),
        "packages": {**{name: version(name) for name in PACKAGES}, "nvidia-dali": nvidia.dali.__version__},
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


class StopSignal:
    """While open, SIGINT, SIGTERM and SIGUSR1 only set `asked`; a second SIGINT, at least a second later, exits at once."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked:
            # Under torchrun, one Ctrl-C arrives twice: from the terminal, and forwarded.
            if number == signal.SIGINT and now - self._asked_at > 1:
                os._exit(128 + number)
            return
        self.asked, self._asked_at = True, now
        log.warning(f"{signal.Signals(number).name}: finishing the step and saving; Ctrl-C exits at once")

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
