"""`--dry-run`: everything a run needs, tried without training and without writing."""

from collections.abc import Iterator

from pipeline.dataset import resolve_device
from pipeline.shards.index import UNLABELLED
from train.build import build_dataset, build_masks, build_model, build_training_loader, loop_settings
from train.checkpoint import list_checkpoints
from train.config.schema import Config
from train.distributed import ranks_from_environment
from train.memory import device_memory, measure_step
from train.output.folder import check_run_folder, run_folder

GIB = 2**30


def dry_run(config: Config) -> Iterator[str]:
    """Lines for the user, each after its part has been tried. Raises ValueError or FileNotFoundError as a run would."""
    ranks, kind = ranks_from_environment(), resolve_device(config.device)
    device = ranks.device(kind)
    dataset = build_dataset(config)
    loader = build_training_loader(config, dataset, ranks)
    batch = next(iter(loader))
    labels = dataset.index.samples["label"]
    labelled = int((labels != UNLABELLED).sum())
    yield (
        f"data: {len(dataset):,} images ({labelled:,} labelled) in {len(dataset.index.shards)} shards of "
        f"{dataset.index.folder}; the first batch of {len(batch.labels)} x {len(batch.crops)} crops was made on {kind}"
    )
    model = build_model(config, device)
    build_masks(config, model, device)
    settings = loop_settings(config, len(loader), device, ranks)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield (
        f"model: {config.model.encoder}, {encoder / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
        f"{model.grid}x{model.grid} tokens in a global crop, {len(model.levels)} levels"
    )
    images = loader.global_batch * settings.accumulation_steps
    yield (
        f"run: {settings.total_steps:,} steps of {images:,} images on {ranks.world_size} rank(s), "
        f"{len(loader) // settings.accumulation_steps:,} steps an epoch, {settings.warmup_steps:,} of warm-up"
    )
    need = measure_step(config, settings.use_amp).total(config.data.batch_size, config.data.crop_counts[1])
    have = device_memory(device)
    yield (
        f"memory: about {need / GIB:.2f} GiB for a step (weights, optimiser and activations), of {have / GIB:.1f} GiB of {device}"
        + ("" if need < have else ": IT WILL NOT FIT")
    )
    check_run_folder(config)
    folder = run_folder(config)
    found = list_checkpoints(folder / "checkpoints")
    start = f"goes on from {found[-1].name}" if found and config.checkpoint.resume == "auto" else "starts at step 0"
    yield f"folder: {folder}; {start if config.checkpoint.resume in ('auto', 'none') else 'resumes ' + config.checkpoint.resume}"
