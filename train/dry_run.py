"""`--dry-run`: everything a run needs, tried without training and without writing."""

import logging

from pipeline.dataset import resolve_device
from pipeline.shards.index import UNLABELLED
from train.build import amp_enabled, build_dataset, build_masks, build_model, build_schedule, build_training_loader
from train.checkpoint import list_checkpoints
from train.config.schema import Config
from train.distributed import ranks_from_environment, use_device
from train.evaluation.online import OnlineEvaluation
from train.memory import device_memory, measure_step, pipeline_bytes
from train.output.folder import check_run_folder, run_folder

log = logging.getLogger(__name__)

GIB = 2**30


def dry_run(config: Config) -> None:
    """Log a line for each part that was tried. Raises ValueError or FileNotFoundError as a run would."""
    ranks, kind = ranks_from_environment(), resolve_device(config.device)
    device = use_device(ranks, kind)
    dataset = build_dataset(config)
    loader = build_training_loader(config, dataset, ranks)
    batch = next(iter(loader))
    labelled = int((dataset.index.samples["label"] != UNLABELLED).sum())
    log.info(
        f"data: {len(dataset):,} images ({labelled:,} labelled) in {len(dataset.index.shards)} shards of "
        f"{dataset.index.folder}; the first batch of {len(batch.labels)} x {len(batch.crops)} crops was made on {kind}"
    )
    model = build_model(config, device)
    build_masks(config, model, device)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        f"model: {config.model.encoder}, {encoder / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
        f"{model.grid}x{model.grid} tokens in a global crop, {len(model.levels)} levels"
    )
    schedule, parts = build_schedule(config, len(loader)), config.training.accumulation_steps
    log.info(
        f"run: {schedule.total_steps:,} steps of {loader.global_batch * parts:,} images on {ranks.world_size} rank(s), "
        f"{len(loader) // parts:,} steps an epoch, {schedule.warmup_steps:,} of warm-up"
    )
    step = measure_step(config, amp_enabled(config, device)).total(config.data.batch_size, config.data.crop_counts[1])
    crops, have = pipeline_bytes(config, dataset.index), device_memory(device)
    log.info(
        f"memory: about {step / GIB:.2f} GiB for a step (weights, optimiser and activations) and {crops / GIB:.2f} GiB for "
        f"DALI's images and crops, of {have / GIB:.1f} GiB of {device}{'' if step + crops < have else ': IT WILL NOT FIT'}"
    )
    folder, resume = run_folder(config), config.checkpoint.resume
    OnlineEvaluation(config, folder, model)  # reports what is wrong with the validation split and the labels
    check_run_folder(config, dataset.index.digest)
    found = list_checkpoints(folder / "checkpoints") if resume == "auto" else []
    start = f"would continue from {found[-1].name}" if found else "would start at step 0"
    log.info(f"folder: {folder}; {start if resume in ('auto', 'none') else f'would continue from {resume}'}")
