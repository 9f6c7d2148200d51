"""All probes on one checkpoint, each next to raw pixels and the random initialisation."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, Level
from pipeline.dataset import resolve_device
from pipeline.text import markdown_table
from train.build import build_encoder, build_evaluation_loaders, build_model, torch_threads, with_crop_device
from train.checkpoint import MANIFEST, MIXED, checkpoint_step, load_checkpoint, newest_checkpoint
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.features import Extractor, check_labels, colour_histogram, pixels
from train.evaluation.measure import Scores, measure
from train.evaluation.placement import Placement, dense_features
from train.output.report import SCORE_NAMES

KNN_KS = (10, 20, 100, 200)
LAST_BLOCKS = 4  # concatenated for the linear probe, as in DINO (arXiv 2104.14294)
LINEAR_EPOCHS = 20  # for runs that measure no linear probe themselves (evaluation.linear_epochs is 0)
ROW_NAMES = SCORE_NAMES | {"trained": "trained"}

Figure = tuple[str, str, str, float]
"""Probe, features, setting and accuracy."""

log = logging.getLogger(__name__)


def find_checkpoint(
    path: Path, settings: Path | None = None, data: Path | str | None = None, max_samples: int | None = None,
    device: str | None = None,
) -> tuple[Path, Config]:  # fmt: skip
    """Return the checkpoint at `path`, or the newest undamaged one of the run at `path`, and its run's settings with changes.

    Raises FileNotFoundError when there is none, ValueError for wrong settings.
    """
    is_run = not (path / MANIFEST).exists()
    if is_run and not (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{path}: neither a run's folder nor a checkpoint; give runs/NAME or runs/NAME/checkpoints/step_*"
        )
    checkpoint = newest_checkpoint(path / "checkpoints") if is_run else path
    if checkpoint is None:
        raise FileNotFoundError(f"{path}: no undamaged checkpoint here")
    settings = settings or (path if is_run else path.resolve().parent.parent) / "config.yaml"
    if not settings.exists():
        raise FileNotFoundError(f"{settings}: no such file; name the checkpoint's settings with --config")
    changes: dict[str, Any] = {"data.data_path": data, "evaluation.max_samples": max_samples, "device": device}
    changes["data.crop_device"] = "auto"  # the run's own choice may not work here
    return checkpoint, load_config(settings, [f"{key}={value}" for key, value in changes.items() if value is not None])


def encoder_features(encoder: MultiCropEncoder, levels: Sequence[Level]) -> Extractor:
    """Return an extractor of `last` as above, `last4` and `level_0` .. `level_i`.

    `last4`, `[n, 4 * D]`: the same of the last four blocks, or `last2` of an encoder with two. `level_i`, `[n, D]`: the mean of
    that level's target map, layer-normed as in the loss; the level's stride does not change the mean.
    """
    last = range(max(encoder.depth - LAST_BLOCKS, 0), encoder.depth)
    layers = [*last, *(level.layer for level in levels)]

    def extractor(crops: torch.Tensor) -> dict[str, torch.Tensor]:
        (out,) = encoder([(crops, None)], layers)
        blocks = [encoder.vit.norm(tokens).mean(dim=1) for tokens in out.layers[: len(last)]]
        maps = [F.layer_norm(tokens.float(), tokens.shape[-1:]).mean(dim=1) for tokens in out.layers[len(last) :]]
        of_levels = {f"level_{rung}": features for rung, features in enumerate(maps)}
        return {"last": out.tokens.mean(dim=1), f"last{len(last)}": torch.cat(blocks, dim=1), **of_levels}

    return extractor


def load_models(checkpoint: Path, config: Config, device: torch.device) -> tuple[HJEPA, MultiCropEncoder]:
    """Return the trained model and its encoder at the seeded initialisation. Raises ValueError for another architecture."""
    model, initial = load_trained(checkpoint, config, device), build_encoder(config).to(device)
    return model.eval(), initial.requires_grad_(False).eval()


def load_trained(checkpoint: Path, config: Config, device: torch.device) -> HJEPA:
    """Return the model of a checkpoint; its target is what the run exports, also if that is mixed with the starting weights."""
    model = build_model(config, device)
    load_checkpoint(checkpoint, model)
    if (path := checkpoint.resolve().parent.parent / MIXED).is_file():
        with safe_open(path, "pt") as file:
            is_of_this_step = (file.metadata() or {}).get("step") == str(checkpoint_step(checkpoint))
        if is_of_this_step:
            model.target.vit.load_state_dict(load_file(path))
    return model


def load_start(config: Config, device: torch.device) -> dict[str, MultiCropEncoder]:
    """Return the encoder at the run's starting weights as `start`; nothing for a run without, or when they are away."""
    if config.model.weights is None:
        return {}
    from train.adapt.weights import starting_encoder

    try:
        return {"start": starting_encoder(config, device)}
    except ValueError as error:
        log.warning(f"no row for the starting weights: {error}")
        return {}


def open_encoders(checkpoint: Path, config: Config) -> tuple[torch.device, HJEPA, dict[str, MultiCropEncoder]]:
    """Return the device, the trained model, and the encoders `random_init`, `start`, if there is one, and `trained` on it."""
    device = torch.device("cuda" if resolve_device(config.device) == "gpu" else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(torch_threads(config))
    model, initial = load_models(checkpoint, config, device)
    return device, model, {"random_init": initial, **load_start(config, device), "trained": model.target}


def evaluate(checkpoint: Path, config: Config, probes: Sequence[str]) -> dict[str, Any]:
    """Return the report: what was measured and, under `figures`, the scores of each probe on each kind of features.

    With labels that allow no accuracy, missing ones or one label for all images, there are figures of placement only. Raises
    FileNotFoundError for missing shards, ValueError for another architecture and for other classes in val than in train.
    """
    device, model, encoders = open_encoders(checkpoint, config)
    config = with_crop_device(config)
    loaders = build_evaluation_loaders(config)
    train, val = (loader.index for loader in loaders)
    problems = check_labels(train, val)
    if text := problems.missing or problems.one_label:
        log.warning(f"no probes, only placement accuracy: {text}")
        probes = ()
    elif problems.unknown:
        log.warning(problems.unknown)
    log.info(f"measuring {len(train):,} + {len(val):,} images ...")
    extractors: dict[str, Extractor] = {"pixels": pixels, "colour_histogram": colour_histogram}
    extractors |= {name: encoder_features(encoder, model.levels) for name, encoder in encoders.items()}
    ks = ([k for k in KNN_KS if k <= len(train)] or [len(train)]) if "knn" in probes else ()
    epochs = (config.evaluation.linear_epochs or LINEAR_EPOCHS) if "linear" in probes else 0
    measured = measure(loaders, extractors, device, ks=ks, linear_epochs=epochs) if ks or epochs else {}
    figures = [figure for probe in probes for name in measured for figure in pooled_figures(probe, name, measured[name])]
    figures += placement_figures(Placement(config, val), encoders, model.levels)
    return {
        "checkpoint": str(checkpoint), "step": checkpoint_step(checkpoint),
        "data": [str(train.folder), str(val.folder)], "images": [len(train), len(val)],
        "figures": [dict(zip(("probe", "features", "setting", "accuracy"), figure, strict=True)) for figure in figures],
    }  # fmt: skip


def pooled_figures(probe: str, name: str, scores: Scores) -> Iterator[Figure]:
    """Yield the figures of one extractor in `knn` or `linear`."""
    if probe == "linear" and scores.linear is not None:
        accuracy, setting = scores.linear
        yield probe, name, setting, accuracy
    for key, by_k in scores.knn.items() if probe == "knn" else ():
        yield from ((probe, full_name(name, key), f"k={k}", accuracy) for k, accuracy in by_k.items())


def placement_figures(pairs: Placement, encoders: dict[str, MultiCropEncoder], levels: Sequence[Level]) -> Iterator[Figure]:
    scores = pairs.baselines(encoders["trained"].patch_size)
    for name, encoder in encoders.items():
        scores |= {full_name(name, key): score for key, score in pairs.measure(dense_features(encoder, levels)).items()}
    yield from (("placement", features, f"{pairs.count} pairs of crops", score) for features, score in scores.items())


def full_name(encoder: str, key: str) -> str:
    return encoder if key == "last" else f"{encoder}, {key.replace('_', ' ')}"


def report_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown, one row for each probe and kind of features."""
    train, test = report["images"]
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for score in report["figures"]:
        groups.setdefault((score["probe"], score["features"]), []).append((score["setting"], f"{score['accuracy']:.1f}"))
    rows = []
    for (probe, features), scores in groups.items():
        name, comma, level = features.partition(", ")
        rows.append((probe, f"{ROW_NAMES[name]}{comma}{level}", *map(" / ".join, zip(*scores, strict=True))))
    title = f"{report['checkpoint']}: {train:,} training and {test:,} validation images of {report['data'][1]}"
    return f"{title}\n\n{markdown_table(('probe', 'features', 'setting', 'accuracy, %'), rows)}"
