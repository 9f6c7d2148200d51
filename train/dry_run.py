"""`--dry-run`: takes one real step and writes nothing. And the advice for a step that runs out of memory."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from model.hjepa import HJEPA
from pipeline.crops.device import is_out_of_memory
from train.checkpoint import list_checkpoints
from train.config.schema import Config
from train.evaluation.online import OnlineEvaluation
from train.monitor import memory_metrics
from train.output.folder import check_run_folder
from train.recorder import log_description
from train.trainer import Trainer

log = logging.getLogger(__name__)

GIB = 2**30


def dry_run(trainer: Trainer) -> None:
    """Take one step and log what it used. Raises ValueError or FileNotFoundError as the run would."""
    config, device = trainer.config, trainer.device
    log_description(trainer)
    before, started = memory_metrics(device), time.perf_counter()
    trainer.train_step()  # also waits for the device: it reads the first loss
    seconds, after = time.perf_counter() - started, memory_metrics(device)
    peak = after["peak_memory_bytes"] / GIB
    used = f"raised the memory of this process from {before['peak_memory_bytes'] / GIB:.2f} to {peak:.2f} GiB"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        used = f"took {peak:.2f} GiB in torch; {after['device_memory_bytes'] / GIB:.2f} of {total:.1f} GiB of {device} are in use"
    crops = f"{config.data.batch_size} images with {sum(config.data.crop_counts)} crops"
    log.info(f"step: {crops} on each rank took {seconds:.1f} s, including the start of the loader, and {used}")
    OnlineEvaluation(config, trainer.folder, cast(HJEPA, trainer.model))  # reports problems of the validation split
    check_run_folder(config, trainer.dataset.index.digest)
    resume = config.checkpoint.resume
    checkpoints = list_checkpoints(trainer.folder / "checkpoints")
    begin = f"continue from {checkpoints[-1].name}" if resume == "auto" and checkpoints else "start at step 0"
    log.info(f"folder: {trainer.folder}; would {begin if resume in ('auto', 'none') else f'continue from {resume}'}")


@contextmanager
def out_of_memory_explained(config: Config, device: torch.device) -> Iterator[None]:
    """Turn the out-of-memory errors of torch, DALI and CUDA into a ValueError that names the settings to change, in order."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        crops, checkpointing = config.data.multicrop, str(config.model.grad_checkpointing).lower()
        raise ValueError(
            f"out of memory: a step does not fit the memory of {device}. Lower, in this order, "
            f"data.multicrop.num_local_crops (now {crops.num_local_crops}), data.batch_size (now {config.data.batch_size}) or "
            f"data.multicrop.local_crop_size (now {crops.local_crop_size}); then set model.grad_checkpointing=true (now "
            f"{checkpointing}), which takes more time. --dry-run prints what a step uses"
        ) from None
