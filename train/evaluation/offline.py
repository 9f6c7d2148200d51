"""All probes on one checkpoint, each next to raw pixels and the random initialisation."""

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from pipeline.dataset import resolve_device
from train.build import build_evaluation_loaders, build_model, torch_threads, with_crop_device
from train.checkpoint import MANIFEST, checkpoint_step, load_checkpoint, newest_checkpoint
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.features import (
    Features,
    TokenStream,
    colour_histogram,
    encoder_features,
    extract,
    patch_tokens,
    pixel_tokens,
    pixels,
)
from train.evaluation.knn import knn_accuracies
from train.evaluation.labels import check_labels, unknown_labels
from train.evaluation.probes import attentive_probe, linear_probe, lowshot_accuracies

KNN_KS = (10, 20, 100, 200)
SHOTS, SHOT_SEEDS = (1, 10), (0, 1, 2, 3, 4)
LINEAR_EPOCHS = 20  # where the run's settings have 0
ROW_NAMES = {
    "pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "random_init": "random initialisation",
    "trained": "trained",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """One accuracy of the report, in percent; `spread` is the standard deviation over `repeats` random choices of images."""

    probe: str
    features: str
    setting: str
    accuracy: float
    spread: float | None = None
    repeats: int = 1


def find_checkpoint(
    path: Path, settings: Path | None = None, data: Path | None = None, max_samples: int | None = None,
    device: str | None = None,
) -> tuple[Path, Config]:  # fmt: skip
    """The checkpoint at `path`, or the newest sound one of the run at `path`, and its run's settings with the changes given.

    Raises FileNotFoundError where there is none, ValueError for wrong settings.
    """
    if (path / MANIFEST).exists():
        checkpoint, run = path, path.resolve().parent.parent
    elif (path / "checkpoints").is_dir():
        found, run = newest_checkpoint(path / "checkpoints"), path
        if found is None:
            raise FileNotFoundError(f"{path}: no undamaged checkpoint here")
        checkpoint = found
    else:
        raise FileNotFoundError(
            f"{path}: neither a run's folder nor a checkpoint; give runs/NAME or runs/NAME/checkpoints/step_*"
        )
    settings = settings or run / "config.yaml"
    if not settings.exists():
        raise FileNotFoundError(f"{settings}: no such file; name the checkpoint's settings with --config")
    changes: dict[str, Any] = {"data.data_path": data, "evaluation.max_samples": max_samples, "device": device}
    if device == "cpu":
        changes["data.crop_device"] = "auto"  # whatever the run, trained on a GPU, has
    return checkpoint, load_config(settings, [f"{key}={value}" for key, value in changes.items() if value is not None])


def load_models(checkpoint: Path, config: Config, device: torch.device) -> tuple[HJEPA, MultiCropEncoder]:
    """The trained model and its encoder at the seeded initialisation. ValueError for another architecture."""
    model, initial = build_model(config, device), build_model(config, device).target
    load_checkpoint(checkpoint, model)
    return model.eval(), initial.eval()


def evaluate(checkpoint: Path, config: Config, probes: tuple[str, ...]) -> dict[str, Any]:
    """The report: what was measured, and under `figures` the scores of each probe on each kind of features.

    Raises FileNotFoundError for missing shards, ValueError for another architecture and for labels that give no accuracy:
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
    if unknown := unknown_labels(*indices):
        log.warning(unknown)
    extractors = {
        "pixels": pixels,
        "colour_histogram": colour_histogram,
        "random_init": encoder_features(initial, model.levels),
        "trained": encoder_features(model.target, model.levels),
    }
    log.info("features of %s ...", " + ".join(f"{len(loader.index):,}" for loader in loaders) + " images")
    train, test = (extract(loader, extractors) for loader in loaders)
    scores: list[Score] = []
    for probe in probes:
        log.info("%s ...", probe)
        if probe == "attentive":
            scores += attentive_scores(config, model, initial, device)
            continue
        for name in extractors:
            scores += POOLED_PROBES[probe](config, name, train[name], test[name], device)
    return {
        "checkpoint": str(checkpoint),
        "step": checkpoint_step(checkpoint),
        "data": [str(loader.index.folder) for loader in loaders],
        "images": [len(loader.index) for loader in loaders],
        "figures": [vars(score) for score in scores],
    }


def knn_scores(_: Config, name: str, train: Features, test: Features, device: torch.device) -> list[Score]:
    ks = [k for k in KNN_KS if k <= len(train.labels)] or [len(train.labels)]
    scores = []
    for key in train.values:
        if key.startswith("last") and key != "last":
            continue  # for the linear probe
        features = name if key == "last" else f"{name}, {key.replace('_', ' ')}"
        found = knn_accuracies(train.values[key], train.labels, test.values[key], test.labels, ks, device)
        scores += [Score("knn", features, f"k={k}", accuracy) for k, accuracy in found.items()]
    return scores


def linear_scores(config: Config, name: str, train: Features, test: Features, device: torch.device) -> list[Score]:
    names = [key for key in train.values if key.startswith("last")]
    accuracy, setting = linear_probe(train, test, names, config.evaluation.linear_epochs or LINEAR_EPOCHS, device)
    return [Score("linear", name, setting, accuracy)]


def lowshot_scores(_: Config, name: str, train: Features, test: Features, device: torch.device) -> list[Score]:
    scores = []
    for shots in SHOTS:
        found = lowshot_accuracies(train, test, shots, SHOT_SEEDS, device)
        spread = statistics.stdev(found)
        scores.append(Score("lowshot", name, f"{shots} per class", statistics.mean(found), spread, len(found)))
    return scores


POOLED_PROBES = {"knn": knn_scores, "linear": linear_scores, "lowshot": lowshot_scores}


def attentive_scores(config: Config, model: HJEPA, initial: MultiCropEncoder, device: torch.device) -> list[Score]:
    patch = model.target.patch_size
    tokens = {
        "pixels": (pixel_tokens(patch), 3 * patch**2),
        "random_init": (patch_tokens(initial), initial.width),
        "trained": (patch_tokens(model.target), model.target.width),
    }
    scores = []
    for name, (take, width) in tokens.items():
        log.info("  %s ...", ROW_NAMES[name])
        # Shuffled, since the heads train on the loader's batches.
        train, test = build_evaluation_loaders(config, shuffle=True)
        classes = 1 + max(int(loader.index.samples["label"].max()) for loader in (train, test))
        accuracy, setting = attentive_probe(TokenStream(train, take), TokenStream(test, take), width, classes, device)
        scores.append(Score("attentive", name, setting, accuracy))
    return scores


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, one row for each probe and kind of features."""
    train, test = report["images"]
    lines = [
        f"{report['checkpoint']}: {train:,} training and {test:,} validation images of {report['data'][1]}",
        "",
        "| probe | features | setting | accuracy, % |",
        "|---|---|---|---|",
    ]
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for score in report["figures"]:
        grouped.setdefault((score["probe"], score["features"]), []).append(score)
    for (probe, features), scores in grouped.items():
        name, _, level = features.partition(", ")
        row = ROW_NAMES[name] + (f", {level}" if level else "")
        settings, values = " / ".join(score["setting"] for score in scores), " / ".join(map(shown_score, scores))
        lines.append(f"| {probe} | {row} | {settings} | {values} |")
    return "\n".join(lines)


def shown_score(score: dict[str, Any]) -> str:
    spread = "" if score["spread"] is None else f" ± {score['spread']:.1f} (std of {score['repeats']})"
    return f"{score['accuracy']:.1f}{spread}"
