"""All probes on one checkpoint, each next to raw pixels and the random initialisation."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from pipeline.dataset import resolve_device
from train.build import build_evaluation_loaders, build_model, torch_threads
from train.checkpoint import MANIFEST, checkpoint_step, load_checkpoint, newest_checkpoint
from train.config.load import load_config
from train.config.schema import Config
from train.evaluation.attentive import TokenStream, attentive_probe
from train.evaluation.features import (
    Features,
    check_labels,
    colour_histogram,
    encoder_features,
    extract,
    patch_tokens,
    pixel_tokens,
    pixels,
)
from train.evaluation.knn import knn_accuracies
from train.evaluation.linear import linear_probe, lowshot_accuracies

KNN_KS = (10, 20, 100, 200)
SHOTS, SHOT_SEEDS = (1, 10), (0, 1, 2, 3, 4)
LINEAR_EPOCHS = 20  # where the run itself asks for none
ROW_NAMES = {
    "pixels": "raw pixels",
    "colour_histogram": "colour histogram",
    "random_init": "random initialisation",
    "trained": "trained",
}


@dataclass(frozen=True)
class Figure:
    """One number of the report, in percent; `spread` is the standard deviation over `repeats` drawings of images."""

    probe: str
    features: str
    setting: str
    accuracy: float
    spread: float | None = None
    repeats: int = 1


def find_checkpoint(
    place: Path, settings: Path | None = None, data: Path | None = None, max_samples: int | None = None,
    device: str | None = None,
) -> tuple[Path, Config]:  # fmt: skip
    """The checkpoint that a run's folder or a checkpoint's path means, and its run's settings, with changes.

    Raises FileNotFoundError where there is none, ValueError for wrong settings.
    """
    if (place / MANIFEST).exists():
        checkpoint, run = place, place.resolve().parent.parent
    elif (place / "checkpoints").is_dir():
        found, run = newest_checkpoint(place / "checkpoints"), place
        if found is None:
            raise FileNotFoundError(f"{place}: no sound checkpoint here")
        checkpoint = found
    else:
        raise FileNotFoundError(
            f"{place}: neither a run's folder nor a checkpoint; give runs/NAME or runs/NAME/checkpoints/step_*"
        )
    settings = settings or run / "config.yaml"
    if not settings.exists():
        raise FileNotFoundError(f"{settings}: there is no such file; name the checkpoint's settings with --config")
    changes = {"data.data_path": data, "evaluation.max_samples": max_samples, "device": device}
    return checkpoint, load_config(settings, [f"{key}={value}" for key, value in changes.items() if value is not None])


def load_models(checkpoint: Path, config: Config, device: torch.device) -> tuple[HJEPA, MultiCropEncoder]:
    """The trained model and its encoder at the seeded initialisation. ValueError for another architecture."""
    model, initial = build_model(config, device), build_model(config, device).target
    load_checkpoint(checkpoint, model)
    return model.eval(), initial.eval()


def evaluate(checkpoint: Path, config: Config, probes: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """The report: where it was measured, and `figures`, one for each probe, features and setting.

    Raises FileNotFoundError for missing shards, ValueError for samples without labels and for another architecture.
    """
    kind = resolve_device(config.device)
    device = torch.device("cuda" if kind == "gpu" else "cpu")
    if kind == "cpu":
        torch.set_num_threads(torch_threads())
    model, initial = load_models(checkpoint, config, device)
    loaders = build_evaluation_loaders(config)
    for loader in loaders:
        check_labels(loader)
    extractors = {
        "pixels": pixels,
        "colour_histogram": colour_histogram,
        "random_init": encoder_features(initial, model.levels),
        "trained": encoder_features(model.target, model.levels),
    }
    say(f"features of {len(loaders[0].index):,} + {len(loaders[1].index):,} images ...")
    train, test = (extract(loader, extractors) for loader in loaders)
    figures = []
    for probe in probes:
        say(f"{probe} ...")
        if probe == "attentive":
            figures += attentive_figures(config, model, initial, device, say)
            continue
        for name in extractors:
            figures += PROBES[probe](config, name, train[name], test[name], device)
    return {
        "checkpoint": str(checkpoint),
        "step": checkpoint_step(checkpoint),
        "data": [str(loader.index.folder) for loader in loaders],
        "images": [len(loader.index) for loader in loaders],
        "figures": [vars(figure) for figure in figures],
    }


def knn_figures(_: Config, name: str, train: Features, test: Features, device: torch.device) -> list[Figure]:
    figures = []
    for key in train.values:
        if key.startswith("last") and key != "last":
            continue  # the linear probe's
        parts = (train.values[key], train.labels, test.values[key], test.labels)
        ks = [k for k in KNN_KS if k <= len(train.labels)] or [len(train.labels)]
        for k, accuracy in knn_accuracies(*parts, ks, device).items():
            figures.append(
                Figure("knn", name if key == "last" else f"{name}, {key.replace('_', ' ')}", f"k={k}", accuracy)
            )
    return figures


def linear_figures(config: Config, name: str, train: Features, test: Features, device: torch.device) -> list[Figure]:
    names = [key for key in train.values if key.startswith("last")]
    accuracy, setting = linear_probe(train, test, names, config.evaluation.linear_epochs or LINEAR_EPOCHS, device)
    return [Figure("linear", name, setting, accuracy)]


def lowshot_figures(_: Config, name: str, train: Features, test: Features, device: torch.device) -> list[Figure]:
    figures = []
    for shots in SHOTS:
        scores = lowshot_accuracies(train, test, shots, SHOT_SEEDS, device)
        figures.append(
            Figure(
                "lowshot", name, f"{shots} per class", statistics.mean(scores), statistics.stdev(scores), len(scores)
            )
        )
    return figures


PROBES = {"knn": knn_figures, "linear": linear_figures, "lowshot": lowshot_figures}


def attentive_figures(
    config: Config, model: HJEPA, initial: MultiCropEncoder, device: torch.device, say: Callable[[str], None]
) -> list[Figure]:
    patch = model.target.patch_size
    tokens = {
        "pixels": (pixel_tokens(patch), 3 * patch**2),
        "random_init": (patch_tokens(initial), initial.width),
        "trained": (patch_tokens(model.target), model.target.width),
    }
    figures = []
    for name, (take, width) in tokens.items():
        say(f"  {ROW_NAMES[name]} ...")
        # Its training images come shuffled: they are met batch by batch.
        train, test = build_evaluation_loaders(config, shuffle=True)
        classes = 1 + max(int(loader.index.samples["label"].max()) for loader in (train, test))
        streams = TokenStream(train, take), TokenStream(test, take)
        accuracy, setting = attentive_probe(*streams, width, classes, device, say)
        figures.append(Figure("attentive", name, setting, accuracy))
    return figures


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, one line for each probe and kind of features."""
    train, test = report["images"]
    lines = [
        f"{report['checkpoint']}: {train:,} training and {test:,} validation images of {report['data'][1]}",
        "",
        "| probe | features | setting | accuracy, % |",
        "|---|---|---|---|",
    ]
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figure in report["figures"]:
        grouped.setdefault((figure["probe"], figure["features"]), []).append(figure)
    for (probe, features), figures in grouped.items():
        name, _, level = features.partition(", ")
        shown = ROW_NAMES[name] + (f", {level}" if level else "")
        settings, scores = " / ".join(figure["setting"] for figure in figures), " / ".join(map(shown_score, figures))
        lines.append(f"| {probe} | {shown} | {settings} | {scores} |")
    return "\n".join(lines)


def shown_score(figure: dict[str, Any]) -> str:
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.1f} (std of {figure['repeats']})"
    return f"{figure['accuracy']:.1f}{spread}"
