"""Checkpoints: a folder of safetensors and JSON with checksums, written beside and renamed. Nothing is ever unpickled."""

import hashlib
import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files do not match their checksums."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold: copies, so that training can continue while they are written."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Snapshot:
    """`state` is JSON with a `step`, and a `score` by which the best are kept (higher is better) or null.

    The copies stay on their device, which takes milliseconds where copying to the host takes seconds; if there is no memory
    for them, they go to the host at once.
    """
    parts = (dict(model.state_dict()), _optimizer_tensors(optimizer))
    try:
        tensors, moments = ({name: value.detach().clone() for name, value in part.items()} for part in parts)
    except torch.OutOfMemoryError:
        tensors, moments = ({name: value.detach().cpu() for name, value in part.items()} for part in parts)
    return Snapshot(tensors, moments, json.loads(json.dumps(state)))


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step_00001234` and return its path. Raises OSError, and then leaves nothing behind.

    The files are flushed to disk before the rename: a checkpoint folder either does not exist or is complete.
    """
    final = checkpoint_path(folder, snapshot.state["step"])
    temporary = folder / f".{final.name}.partial"
    for left_behind in folder.glob(".step_*.partial"):  # of a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    try:
        _write_files(temporary, snapshot)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(parents=True)
    for name, tensors in ((MODEL, snapshot.model), (OPTIMIZER, snapshot.optimizer)):
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / name)
    (folder / STATE).write_text(json.dumps(snapshot.state, indent=1))
    (folder / MANIFEST).write_text(_manifest(_sums(folder)))
    for path in (*folder.iterdir(), folder):
        _flush(path)


def prune_checkpoints(folder: Path, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest `keep_last` and the `keep_best` of the highest score."""
    paths = list_checkpoints(folder)
    scores = {path: score for path in paths if (score := _score(path)) is not None}
    best = sorted(scores, key=lambda path: (scores[path], path.name))[::-1][:keep_best]
    for path in paths[:-keep_last]:
        if path not in best:
            shutil.rmtree(path)


def _score(path: Path) -> float | None:
    try:
        return json.loads((path / STATE).read_text())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: it may be deleted


def data_of(path: Path) -> str | None:
    """The digest of the shards that a checkpoint was trained on; None in old checkpoints and damaged ones."""
    try:
        return json.loads((path / STATE).read_text())["loader"]["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8))


def verify_checkpoint(path: Path) -> None:
    """Raise DamagedCheckpointError unless every file exists and the manifest equals, to the byte, the one they give."""
    try:
        written, sums = (path / MANIFEST).read_bytes(), _sums(path)
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: unreadable ({error})") from None
    if written != _manifest(sums).encode():
        wrong = [name for name, checksum in sums.items() if checksum.encode() not in written]
        raise DamagedCheckpointError(f"{path}: damaged: {', '.join(wrong or [MANIFEST])}")


def _sums(folder: Path) -> dict[str, str]:
    return {name: _sha256(folder / name) for name in (MODEL, OPTIMIZER, STATE)}


def _manifest(sums: dict[str, str]) -> str:
    return json.dumps({"format": 1, "sha256": sums}, indent=1)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are reported."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except DamagedCheckpointError as error:
            log.warning(f"{error}; falling back to the previous checkpoint")
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a verified checkpoint into `model` and `optimizer` and return its state.

    Raises DamagedCheckpointError, or ValueError when it belongs to another architecture or optimiser.
    """
    verify_checkpoint(path)
    try:
        model.load_state_dict(load_file(path / MODEL))
        if optimizer is not None:
            moments = load_file(path / OPTIMIZER)
            _check_optimizer(path, optimizer, moments)
            _load_optimizer(optimizer, moments)
    except (RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path}: belongs to another architecture ({first})") from None
    return json.loads((path / STATE).read_text())


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value
    return tensors


def _check_optimizer(path: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """ValueError if the tensors are those of the other `training.optimizer`."""
    saved = "muon" if any(key.endswith("/momentum") for key in tensors) else "adamw"
    ours = "muon" if any(group.get("muon") for group in optimizer.param_groups) else "adamw"
    if tensors and saved != ours:
        raise ValueError(
            f"{path}: of a run with training.optimizer={saved}, not {ours}: give {saved} to continue it, or "
            "checkpoint.resume=none to start over"
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = [key for key in tensors if key.rpartition("/")[0] == name]
            optimizer.state[parameter] = {key.rpartition("/")[2]: tensors[key].to(parameter.device) for key in keys}


class CheckpointWriter:
    """Writes one snapshot at a time to `folder`, in a thread. A full disk is reported; earlier checkpoints stay."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int) -> None:
        self._folder, self._keep_last, self._keep_best = folder, keep_last, keep_best
        self._thread: threading.Thread | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Return at once, unless the previous snapshot is still being written."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,))
        self._thread.start()

    def wait(self) -> None:
        """Until everything handed over is on the disk, or was refused by it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self._folder, snapshot)
            prune_checkpoints(self._folder, self._keep_last, self._keep_best)
        except OSError as error:
            existing = list_checkpoints(self._folder)
            last = f"the last one is {existing[-1].name}" if existing else "there is none yet"
            log.warning(
                f"{self._folder}: step {snapshot.state['step']} could not be saved ({error}); {last}. Training continues: "
                "free some space, or lower checkpoint.keep_last_n"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
