"""Checkpoints: a folder of safetensors and JSON with checksums, written beside and renamed. Nothing is ever unpickled."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files do not match their checksums."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep_last: int
) -> Path:
    """Write `folder/step_00001234` (`state["step"]`), keep the newest `keep_last`, and return its path.

    The files are flushed to disk before the rename: a checkpoint folder either does not exist or is whole.
    """
    final = checkpoint_path(folder, state["step"])
    temporary = folder / f".{final.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary / MODEL)
    save_file(_optimizer_tensors(optimizer), temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    sums = {name: _sha256(temporary / name) for name in (MODEL, OPTIMIZER, STATE)}
    (temporary / MANIFEST).write_text(json.dumps({"format": 1, "sha256": sums}, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8))


def verify_checkpoint(path: Path) -> None:
    """Raise DamagedCheckpointError unless every file is there and matches its checksum."""
    try:
        sums = json.loads((path / MANIFEST).read_text())["sha256"]
        wrong = [name for name in (MODEL, OPTIMIZER, STATE) if _sha256(path / name) != sums[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path}: unreadable ({error})") from None
    if wrong:
        raise DamagedCheckpointError(f"{path}: {', '.join(wrong)} does not match the checksum in {MANIFEST}")


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; every damaged one on the way is reported through `say`."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except DamagedCheckpointError as error:
            say(f"{error}; falling back to the one before")
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a verified checkpoint into `model` and `optimizer` and return its state.

    Raises DamagedCheckpointError, or ValueError when it belongs to another architecture.
    """
    verify_checkpoint(path)
    try:
        model.load_state_dict(load_file(path / MODEL))
        if optimizer is not None:
            _load_optimizer(optimizer, load_file(path / OPTIMIZER))
    except (RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path}: belongs to another architecture ({first})") from None
    return json.loads((path / STATE).read_text())


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value.contiguous()
    return tensors


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = [key for key in tensors if key.rpartition("/")[0] == name]
            optimizer.state[parameter] = {key.rpartition("/")[2]: tensors[key].to(parameter.device) for key in keys}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
