"""Checkpoints: folders of safetensors and JSON with checksums, written under another name and renamed. Nothing is unpickled."""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.files import file_checksum
from pipeline.shards.manifest import read_as_expected, read_object
from train.distributed import CHECKPOINT_WRITER, Ranks
from train.state import RunState

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
MIXED = "encoder.safetensors"  # in the run's folder: what a run from starting weights exports


class LoaderState(BaseModel, strict=True):
    epoch: NonNegativeInt
    position: NonNegativeInt
    data: str | None = None


class SavedState(BaseModel, strict=True):
    """The least that state.json holds. The checksums next to it prove that it arrived as it was written, not who wrote it."""

    step: Annotated[int, Field(ge=0, lt=10**8)]
    run: RunState
    loader: LoaderState


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files do not match their checksums."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint in host memory, complete once the GPU has passed `copied`; None on a CPU.

    `state` has a `step` and a `score`, higher is better, or null.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    copied: torch.cuda.Event | None = None


class Snapshots:
    """Takes snapshots of a model and its optimiser. They share their memory: a new one overwrites the one before.

    From a GPU, a stream of its own copies them to pinned memory, beside the next forward and backward pass. Only the next
    optimiser step, which changes what is copied, waits for it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._wait_for_copies)

    def take(self, state: dict[str, Any]) -> Snapshot:
        """Copy what a checkpoint holds, `state` as JSON."""
        stream = torch.cuda.Stream() if next(self._model.parameters()).is_cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # without one, this does nothing
            weights = self._copy(MODEL, self._model.state_dict())
            moments = self._copy(OPTIMIZER, _optimizer_tensors(self._optimizer))
        self._copied = None if stream is None else stream.record_event()
        return Snapshot(weights, moments, json.loads(json.dumps(state)), self._copied)

    def _copy(self, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = {}
        for name, value in tensors.items():
            if (key := f"{part}/{name}") not in self._buffers:
                self._buffers[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            copies[name] = self._buffers[key].copy_(value.detach(), non_blocking=True)
        return copies

    def _wait_for_copies(self, *_: object) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step_00001234` and return its path. Raises OSError, and then leaves nothing behind.

    The files are flushed to disk before the rename: a checkpoint folder either does not exist or is complete. A sound checkpoint
    of the step stays: a run that stops at the step it has just saved or resumed from has no other content for it.
    """
    final = checkpoint_path(folder, snapshot.state["step"])
    temporary = folder / f".{final.name}.partial"
    for abandoned in folder.glob(".step_*.partial"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    if os.path.lexists(final):
        if is_sound(final) and checkpoint_step(final) == snapshot.state["step"]:
            return final
        move_aside([final], folder, "abandoned")
    try:
        temporary.mkdir(parents=True)
        save_file(snapshot.model, temporary / MODEL)
        save_file(snapshot.optimizer, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(snapshot.state, indent=1))
        (temporary / MANIFEST).write_text(_manifest(temporary))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        temporary.rename(final)
        _flush(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune_checkpoints(folder: Path, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest `keep_last` and the `keep_best` with the highest scores.

    Damaged and unreadable checkpoints and links to checkpoints elsewhere stay where they are; damaged ones do not count.
    """
    sound = [path for path in list_checkpoints(folder) if is_sound(path)]
    scores = {path: score for path in sound if isinstance(score := read_state(path).get("score"), int | float)}
    best = sorted(scores, key=lambda path: (scores[path], path.name))[::-1][:keep_best]
    for path in sound[:-keep_last]:
        if path in best or path.is_symlink():
            continue
        try:  # under a name that the next save clears away, should this be cut short
            shutil.rmtree(path.rename(folder / f".{path.name}.partial"))
        except OSError as error:
            log.warning(f"{path}: cannot be deleted ({error.strerror})")


def abandon_others(folder: Path, kept: Path) -> None:
    """Move aside the checkpoints in `folder` that are newer than `kept`, from which the run continues; all, if it lies elsewhere.

    They are of a branch that has been left: neither pruning nor the next start may take them for the present one. The log of
    that branch is copied next to them.
    """
    limit = checkpoint_step(kept) if kept.resolve().parent == folder.resolve() else -1
    if others := [path for path in list_checkpoints(folder)[::-1] if checkpoint_step(path) > limit]:
        target = move_aside(others, folder, "abandoned")
        if (metrics := folder.parent / "metrics.jsonl").exists():
            shutil.copy(metrics, target)
        log.warning(f"{folder}: {', '.join(path.name for path in others[::-1])}: left for another branch, moved to {target.name}")


def move_aside(paths: Iterable[Path], folder: Path, name: str) -> Path:
    """Move files and folders, in this order, to `folder/NAME-1`, or the first number that is free, and return it."""
    target = next(path for number in count(1) if not (path := folder / f"{name}-{number}").exists())
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target


def data_of(path: Path) -> str | None:
    """Return the digest of the shards that a checkpoint was trained on; None for old and for damaged checkpoints."""
    loader = read_state(path).get("loader")
    return loader.get("data") if isinstance(loader, dict) else None


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json without checking it; empty if it is damaged."""
    try:
        return read_object(path / STATE, "")
    except (OSError, ValueError):
        return {}


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's state, whatever its folder is called; where the state is damaged, that of the name."""
    step = read_state(path).get("step")
    return step if isinstance(step, int) and 0 <= step < 10**8 else int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    paths = [path for path in folder.glob("step_" + "[0-9]" * 8) if path.is_dir()]
    return sorted(paths, key=lambda path: (checkpoint_step(path), path.name))


def resumed_from(resume: str, folder: Path, ranks: Ranks) -> Path | None:
    """Return the checkpoint that a run continues: for `auto`, the newest undamaged one, which rank 0 chooses for all."""
    if resume != "auto":
        return None if resume == "none" else Path(resume)
    path = newest_checkpoint(folder) if ranks.is_first else None
    number = ranks.from_first(-1 if path is None else int(path.name.removeprefix("step_")))
    return None if number < 0 else checkpoint_path(folder, number)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, and log the damaged ones. Raises OSError for storage that fails."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except DamagedCheckpointError as error:
            log.warning(f"{error}; falling back to the previous checkpoint")
    return None


def is_sound(path: Path) -> bool:
    """Return True for an undamaged checkpoint. It is read once, and again only if one of its files has changed since."""
    try:
        _verify_once(path, *((s.st_ino, s.st_size, s.st_mtime_ns) for s in map(Path.stat, sorted(path.iterdir()))))
        return True
    except (OSError, DamagedCheckpointError):
        return False


@lru_cache(maxsize=256)
def _verify_once(path: Path, *_: tuple[int, int, int]) -> None:
    verify_checkpoint(path)


def verify_checkpoint(path: Path) -> None:
    """Raise DamagedCheckpointError unless the manifest is, to the byte, that of the files; OSError if they cannot be read."""
    try:
        written, expected = (path / MANIFEST).read_bytes(), _manifest(path).encode()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedCheckpointError(f"{path}: incomplete ({error})") from None
    if written != expected:
        wrong = [name for name, checksum in json.loads(expected)["sha256"].items() if checksum.encode() not in written]
        raise DamagedCheckpointError(f"{path}: damaged: {', '.join(wrong or [MANIFEST])}")


def _manifest(folder: Path) -> str:
    checksums = {name: file_checksum(folder / name) for name in (MODEL, OPTIMIZER, STATE)}
    return json.dumps({"format": 1, "sha256": checksums}, indent=1)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Verify a checkpoint, load it into `model` and `optimizer`, and return its state.

    Raises DamagedCheckpointError, or ValueError when it belongs to another architecture or optimiser.
    """
    verify_checkpoint(path)
    try:
        model.load_state_dict(load_file(path / MODEL))
        if optimizer is not None:
            _load_optimizer(path, optimizer)
    except (RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path}: belongs to another architecture ({reason})") from None
    remedy = "Continue from another checkpoint"
    state = read_object(path / STATE, remedy)
    with read_as_expected(path / STATE, remedy):
        # Validated as JSON, where numbers with and without a point are one type.
        saved = SavedState.model_validate_json(json.dumps(state))
    return {**state, "run": saved.run.as_dict()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as `NAME OF THE PARAMETER/KEY`."""
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if the checkpoint is of the other `training.optimizer`."""
    tensors = load_file(path / OPTIMIZER)
    saved = "muon" if any(key.endswith("/momentum") for key in tensors) else "adamw"
    ours = "muon" if any(group.get("muon") for group in optimizer.param_groups) else "adamw"
    if tensors and saved != ours:
        raise ValueError(
            f"{path}: of a run with training.optimizer={saved}, not {ours}: give {saved} to continue it, or "
            "checkpoint.resume=none to start over"
        )
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = [key for key in tensors if key.rpartition("/")[0] == name]
            optimizer.state[parameter] = {key.rpartition("/")[2]: tensors[key].to(parameter.device) for key in keys}


class CheckpointWriter:
    """Writes one snapshot at a time to `folder`, in a background thread. A full disk is logged; earlier checkpoints stay."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int) -> None:
        self._folder, self._keep_last, self._keep_best = folder, keep_last, keep_best
        self._thread, self._is_saved = threading.Thread(), True

    def write(self, take: Callable[[], Snapshot]) -> None:
        """Take a snapshot and start writing it. Waits only for the previous one, whose memory it overwrites."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(take(),), name=CHECKPOINT_WRITER)
        self._thread.start()

    def wait(self) -> bool:
        """Wait until the last snapshot is on disk, or was refused by it. Returns False in that case."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._is_saved

    def _write(self, snapshot: Snapshot) -> None:
        self._is_saved = False
        try:
            write_checkpoint(self._folder, snapshot)
            self._is_saved = True
            prune_checkpoints(self._folder, self._keep_last, self._keep_best)
        except OSError as error:
            existing = [path for path in list_checkpoints(self._folder) if is_sound(path)]
            last = f"the last one is {existing[-1].name}" if existing else "there is none yet"
            log.warning(
                f"{self._folder}: step {snapshot.state['step']} could not be saved ({error}); {last}. Training continues: "
                "free some space, or lower checkpoint.keep_last_n"
            )
