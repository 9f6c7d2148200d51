"""A run's folder: its settings and environment, and whether another run may continue in it."""

import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nvidia.dali
import torch

from pipeline.files import write_atomic
from pipeline.lock import exclusive
from train.checkpoint import data_of, list_checkpoints, move_aside
from train.config.load import read_values
from train.config.schema import Config
from train.config.yaml12 import ConfigError, changed_settings, flatten

if TYPE_CHECKING:
    from train.adapt.weights import Start

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "numpy", "multicrop-hjepa")
# Sections and keys that may differ between a run and its continuation: the rest decides what the weights mean.
FREE_KEYS = (
    "device", "training.", "checkpoint.", "logging.", "evaluation.",
    "data.data_path", "data.cache_dir", "data.store_retry_s", "data.batch_size", "data.num_workers", "data.prefetch",
    "data.crop_device", "data.pin_memory", "data.max_bad_share",
)  # fmt: skip


def run_folder(config: Config) -> Path:
    return Path(config.logging.run_dir) / config.logging.run_name


def open_run_folder(config: Config, data: str, opened: ExitStack, start: "Start | None" = None) -> Path:
    """Create `run_dir/run_name` with its config.yaml and environment.json, locked until `opened` is closed.

    `data`: the digest of the training shards; `start`: the weights that the run starts from. With `resume: none` an earlier
    run is moved aside. Otherwise raises ValueError, listing the differences, if the folder holds a run with other settings or
    data; also if another process runs in it, or if it cannot be written.
    """
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if links := [path for path in (*folder.iterdir(), *folder.glob("figures/*")) if path.is_symlink()]:
            raise ValueError(f"{links[0]}: a link, and a run writes only into its own folder. Remove it, or set logging.run_dir")
        opened.enter_context(exclusive(folder, "choose another logging.run_name"))
        check_run_folder(config, data)
        if config.checkpoint.resume == "none":
            _start_over(folder)
        write_atomic(folder / "config.yaml", config.to_yaml())
        noted = {} if start is None else {"weights": {"name": start.name, "digest": start.digest, "licence": start.licence}}
        write_atomic(folder / "environment.json", json.dumps({**environment(), **noted}, indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror}); free some space, or choose another logging.run_dir"
        ) from None
    return folder


def check_run_folder(config: Config, data: str) -> None:
    """Raise ValueError if this run would continue one with other settings or on other data in the same folder."""
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
    if known and known[-1] != data:
        path, now = flatten(before).get("data.data_path"), str(config.data.data_path)
        moved = f"data.data_path was {path}, is {now}" if str(path) != now else f"{now} has changed since"
        raise ValueError(
            f"{folder}: holds a run that was trained on other images ({moved}). Give the old ones with data.data_path, choose "
            "another logging.run_name, or checkpoint.resume=none to start over"
        )
    if known and before and (changes := changed_settings(before, config.resolved)):
        log.info(f"{folder}: continues with other settings ({'; '.join(changes)})")


def kept_crop_device(config: Config) -> str | None:
    """Return where the run that this one continues has made its crops, by its settings; None for a new run."""
    resume = config.checkpoint.resume
    folder = run_folder(config) if resume in ("auto", "none") else Path(resume).resolve().parent.parent
    if resume == "none" or not (folder / "checkpoints").exists() or not (folder / "config.yaml").exists():
        return None
    kept = flatten(read_settings(folder / "config.yaml")).get("data.crop_device")
    return "cpu" if kept == "auto" else kept  # a run on the CPU keeps auto


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in `path`. Raises ValueError if it holds none."""
    try:
        if content := read_values(path, {}):
            return content
        raise ConfigError("no section in it")
    except ConfigError as error:
        raise ValueError(
            f"{path}: damaged, no settings ({error}), so this run cannot be compared with them. Remove it to continue with the "
            "settings of this command; checkpoint.resume=none starts over"
        ) from None


def _start_over(folder: Path) -> None:
    """Move an earlier run to `old-1`, or the first number that is free: a run's folder of its own. Damaged images stay known."""
    there = [path for path in folder.iterdir() if not path.name.startswith((".lock", "quarantine", "old-"))]
    if there:
        there.sort(key=lambda path: path.name != "checkpoints")  # they come first: the rest alone is no run to be continued
        log.info(
            f"{folder}: the earlier run there was moved to {move_aside(there, folder, 'old').name}; this one starts at step 0"
        )


def environment() -> dict[str, Any]:
    """Return what a run's results depend on in addition to its settings."""
    return {
        "python": platform.python_version(),
        "packages": {**{name: version(name) for name in PACKAGES}, "nvidia-dali": nvidia.dali.__version__},
        "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": commit(), "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }  # fmt: skip


def commit() -> str | None:
    """Return the commit of the project's code, with `-dirty` if it has changed since; None outside its repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    line = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip() or None
