"""All probes on one checkpoint, each next to raw pixels and the random initialisation."""

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from pipeline.dataset import resolve_device
from pipeline.loader import MultiCropLoader
from train.build import build_evaluation_loaders, build_model, torch_threads, with_crop_device
from train.checkpoint import MANIFEST, checkpoint_step, load_checkpoint, newest_checkpoint
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.features import colour_histogram, encoder_features, pixels
from train.evaluation.labels import check_labels, unknown_labels
from train.evaluation.measure import Scores, measure, num_classes
from train.evaluation.probes import TokenStream, attentive_probe, lowshot_accuracies, patch_tokens, pixel_tokens

KNN_KS = (10, 20, 100, 200)
SHOTS, SHOT_SEEDS = (1, 10), (0, 1, 2, 3, 4)
LINEAR_EPOCHS = 20  # for runs that measure no linear probe themselves (evaluation.linear_epochs is 0)
ROW_NAMES = {
    "pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "random_init": "random initialisation",
    "trained": "trained",
}

log = logging.getLogger(__name__)


def find_checkpoint(
    path: Path, settings: Path | None = None, data: Path | None = None, max_samples: int | None = None,
    device: str | None = None,
) -> tuple[Path, Config]:  # fmt: skip
    """Return the checkpoint at `path`, or the newest undamaged one of the run at `path`, and its run's settings with changes.

    Raises FileNotFoundError when there is none, ValueError for wrong settings.
    """
    if (path / MANIFEST).exists():
        checkpoint, run = path, path.resolve().parent.parent
    elif (path / "checkpoints").is_dir():
        newest, run = newest_checkpoint(path / "checkpoints"), path
        if newest is None:
            raise FileNotFoundError(f"{path}: no undamaged checkpoint here")
        checkpoint = newest
    else:
        raise FileNotFoundError(
            f"{path}: neither a run's folder nor a checkpoint; give runs/NAME or runs/NAME/checkpoints/step_*"
        )
    settings = settings or run / "config.yaml"
    if not settings.exists():
        raise FileNotFoundError(f"{settings}: no such file; name the checkpoint's settings with --config")
    changes: dict[str, Any] = {"data.data_path": data, "evaluation.max_samples": max_samples, "device": device}
    if device == "cpu":
        changes["data.crop_device"] = "auto"  # a run trained on a GPU may have `gpu` here
    return checkpoint, load_config(settings, [f"{key}={value}" for key, value in changes.items() if value is not None])


def load_models(checkpoint: Path, config: Config, device: torch.device) -> tuple[HJEPA, MultiCropEncoder]:
    """Return the trained model and its encoder at the seeded initialisation. Raises ValueError for another architecture."""
    model, initial = build_model(config, device), build_model(config, device).target
    load_checkpoint(checkpoint, model)
    return model.eval(), initial.eval()


def evaluate(checkpoint: Path, config: Config, probes: tuple[str, ...]) -> dict[str, Any]:
    """Return the report: what was measured and, under `figures`, the scores of each probe on each kind of features.

    Raises FileNotFoundError for missing shards, ValueError for another architecture and for labels that allow no accuracy:
    missing ones, one label for all images, other classes in val than in train.
    """
    kind = resolve_device(config.device)
    device = torch.device("cuda" if kind == "gpu" else "cpu")
    if kind == "cpu":
        torch.set_num_threads(torch_threads(config))
    model, initial = load_models(checkpoint, config, device)
    config = with_crop_device(config)
    loaders = build_evaluation_loaders(config)
    indices = [loader.index for loader in loaders]
    check_labels(*indices)
    if warning := unknown_labels(*indices):
        log.warning(warning)
    log.info("measuring %s images ...", " + ".join(f"{len(index):,}" for index in indices))
    return {
        "checkpoint": str(checkpoint),
        "step": checkpoint_step(checkpoint),
        "data": [str(index.folder) for index in indices],
        "images": [len(index) for index in indices],
        "figures": probe_scores(config, probes, loaders, model, initial, device),
    }


def probe_scores(
    config: Config,
    probes: tuple[str, ...],
    loaders: tuple[MultiCropLoader, MultiCropLoader],
    model: HJEPA,
    initial: MultiCropEncoder,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return the scores of each probe on each kind of features."""
    extractors = {
        "pixels": pixels,
        "colour_histogram": colour_histogram,
        "random_init": encoder_features(initial, model.levels),
        "trained": encoder_features(model.target, model.levels),
    }
    num_train = len(loaders[0].index)
    ks = [k for k in KNN_KS if k <= num_train] or [num_train]
    measured = measure(
        loaders,
        extractors,
        device,
        ks=ks if "knn" in probes else (),
        linear_epochs=(config.evaluation.linear_epochs or LINEAR_EPOCHS) if "linear" in probes else 0,
    )
    scores = []
    for probe in probes:
        if probe == "attentive":
            scores += attentive_scores(config, model, initial, device)
        else:
            scores += [score for name, row in measured.items() for score in pooled_scores(probe, name, row, device)]
    return scores


def probe_score(probe: str, features: str, setting: str, accuracies: Sequence[float]) -> dict[str, Any]:
    """Return one figure of the report. With several `accuracies`, it is their mean and their standard deviation."""
    return {
        "probe": probe,
        "features": features,
        "setting": setting,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "repeats": len(accuracies),
    }


def pooled_scores(probe: str, name: str, row: Scores, device: torch.device) -> list[dict[str, Any]]:
    """Return the scores of one extractor in `knn`, `linear` or `lowshot`."""
    if row.linear is not None and probe == "linear":
        accuracy, setting = row.linear
        return [probe_score(probe, name, setting, [accuracy])]
    if probe == "knn":
        return [
            probe_score(probe, name if key == "last" else f"{name}, {key.replace('_', ' ')}", f"k={k}", [accuracy])
            for key, by_k in row.knn.items()
            for k, accuracy in by_k.items()
        ]
    return [
        probe_score(
            probe, name, f"{shots} per class", lowshot_accuracies(row.train, row.test, shots, SHOT_SEEDS, device)
        )
        for shots in SHOTS
    ]


def attentive_scores(
    config: Config, model: HJEPA, initial: MultiCropEncoder, device: torch.device
) -> list[dict[str, Any]]:
    patch = model.target.patch_size
    rows = {
        "pixels": (pixel_tokens(patch), 3 * patch**2),
        "random_init": (patch_tokens(initial), initial.width),
        "trained": (patch_tokens(model.target), model.target.width),
    }
    scores = []
    for name, (tokenizer, width) in rows.items():
        log.info("attentive probe: %s ...", ROW_NAMES[name])
        # Shuffled, since the heads train on the loader's batches.
        train, test = build_evaluation_loaders(config, shuffle=True)
        classes = num_classes(*(torch.tensor(loader.index.samples["label"]) for loader in (train, test)))
        streams = TokenStream(train, tokenizer), TokenStream(test, tokenizer)
        accuracy, setting = attentive_probe(*streams, width, classes, device)
        scores.append(probe_score("attentive", name, setting, [accuracy]))
    return scores


def report_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown, one row for each probe and kind of features."""
    train, test = report["images"]
    lines = [
        f"{report['checkpoint']}: {train:,} training and {test:,} validation images of {report['data'][1]}",
        "",
        "| probe | features | setting | accuracy, % |",
        "|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for score in report["figures"]:
        groups.setdefault((score["probe"], score["features"]), []).append(score)
    for (probe, features), scores in groups.items():
        name, comma, level = features.partition(", ")
        settings, values = " / ".join(score["setting"] for score in scores), " / ".join(map(format_score, scores))
        lines.append(f"| {probe} | {ROW_NAMES[name]}{comma}{level} | {settings} | {values} |")
    return "\n".join(lines)


def format_score(score: dict[str, Any]) -> str:
    spread = "" if score["spread"] is None else f" ± {score['spread']:.1f} (std of {score['repeats']})"
    return f"{score['accuracy']:.1f}{spread}"
