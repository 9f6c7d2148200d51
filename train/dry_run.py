"""`--dry-run`: one real step, of which nothing is written; and the settings to change when it runs out of memory."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from model.hjepa import HJEPA
from pipeline.crops.device import is_out_of_memory
from pipeline.shards.index import UNLABELLED
from train.checkpoint import list_checkpoints
from train.config.schema import Config
from train.evaluation.online import OnlineEvaluation
from train.monitor import memory_metrics
from train.output.folder import check_run_folder
from train.trainer import Trainer

log = logging.getLogger(__name__)

GIB = 2**30


def dry_run(trainer: Trainer) -> None:
    """Log a line for each part of the run. Raises ValueError or FileNotFoundError as the run would."""
    config, model, index, schedule = trainer.config, cast(HJEPA, trainer.model), trainer.dataset.index, trainer.schedule
    labelled = int((index.samples["label"] != UNLABELLED).sum())
    log.info(f"data: {len(index):,} images ({labelled:,} labelled) in {len(index.shards)} shards of {index.folder}")
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        f"model: {config.model.encoder}, {encoder / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
        f"{model.grid}x{model.grid} tokens in a global crop, {len(model.levels)} levels"
    )
    images = trainer.loader.global_batch * config.training.accumulation_steps
    log.info(
        f"run: {schedule.total_steps:,} steps of {images:,} images on {trainer.ranks.world_size} rank(s), "
        f"{trainer.steps_per_epoch:,} steps an epoch, {schedule.warmup_steps:,} of warm-up"
    )
    log.info(f"step: {describe_step(trainer)}")
    OnlineEvaluation(config, trainer.folder, model)  # reports what is wrong with the validation split and the labels
    check_run_folder(config, index.digest)
    resume = config.checkpoint.resume
    found = list_checkpoints(trainer.folder / "checkpoints") if resume == "auto" else []
    begin = (
        f"continue from {found[-1].name if found else resume}"
        if found or resume not in ("auto", "none")
        else "start at step 0"
    )
    log.info(f"folder: {trainer.folder}; would {begin}")


def describe_step(trainer: Trainer) -> str:
    """Take a step and return its time, with the start of the loader, and the most memory that it used."""
    before, started = memory_metrics(trainer.device)["peak_memory_bytes"], time.perf_counter()
    trainer.train_step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, memory = time.perf_counter() - started, memory_metrics(trainer.device)
    batch, crops = trainer.config.data.batch_size, sum(trainer.config.data.crop_counts)
    taken = f"{batch} images of {crops} crops on each rank took {seconds:.1f} s, the start of the loader included"
    if trainer.device.type != "cuda":
        return f"{taken}, and {(memory['peak_memory_bytes'] - before) / GIB:.2f} GiB of memory"
    total = torch.cuda.mem_get_info(trainer.device)[1]
    return (
        f"{taken}; torch took {memory['peak_memory_bytes'] / GIB:.2f} GiB at most, and with DALI and CUDA "
        f"{memory['device_memory_bytes'] / GIB:.2f} of the {total / GIB:.1f} GiB of {trainer.device} are in use"
    )


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
