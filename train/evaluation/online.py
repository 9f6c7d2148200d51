"""k-NN and a linear probe on frozen features before, during and after a run, and baselines that need no training."""

import logging
from pathlib import Path

import torch

from model.hjepa import HJEPA
from pipeline.loader import MultiCropLoader
from train.build import build_evaluation_loaders
from train.config.schema import Config
from train.evaluation.baselines import FILE, measured_on, read_baselines, write_baselines
from train.evaluation.features import (
    Extractor,
    Features,
    colour_histogram,
    extract,
    pixels,
    pooled_features,
)
from train.evaluation.knn import knn_accuracies, nearest_neighbours
from train.evaluation.labels import check_labels, one_label, unknown_labels
from train.evaluation.probes import linear_probe
from train.output.drawing import Neighbours
from train.output.log import rankme

log = logging.getLogger(__name__)


class OnlineEvaluation:
    """Measures the target encoder of `model` on the validation split; without one it warns once and measures nothing.

    Without labels, or with one label for all images, there are `rankme` and `neighbours`, but no accuracies. Raises ValueError
    when the labels of the two splits mean different classes.
    """

    def __init__(self, config: Config, folder: Path, model: HJEPA) -> None:
        self._model, self._settings, self._file = model, config.evaluation, folder / FILE
        self.baselines: dict[str, float] | None = None
        self.rankme: float | None = None
        self.linear: float | None = None
        self._measured: tuple[Features, Features] | None = None
        self._loaders: tuple[MultiCropLoader, MultiCropLoader] | None = None
        self._labelled, self.one_label = False, False
        try:
            self._loaders = build_evaluation_loaders(config)
        except FileNotFoundError as error:
            log.warning("no validation images, so nothing is measured: %s", error)
            return
        indices = [loader.index for loader in self._loaders]
        self.one_label = bool(one_label(indices[0]))
        try:
            check_labels(*indices)
        except ValueError as error:
            log.warning("no accuracies, only RankMe and neighbours: %s", error)
            return
        self._labelled = True
        if unknown := unknown_labels(*indices):
            log.warning(unknown)

    @property
    def num_validation(self) -> int:
        """Images that the scores are measured on."""
        return 0 if self._loaders is None else len(self._loaders[1].index)

    def measure_baselines(self) -> None:
        """k-NN of raw pixels, colour histogram and the untrained model. Call it before training.

        Kept in baselines.json, and measured again for other images or settings of the evaluation.
        """
        if not self._labelled or self._loaders is None:
            return
        key = measured_on(self._loaders[0].index, self._loaders[1].index, self._settings)
        try:
            self.baselines = read_baselines(self._file, key)
        except ValueError as error:
            log.warning("%s", error)
        if self.baselines is not None:
            return
        again = f" again, since {self._file} is of other images or settings" if self._file.exists() else ""
        log.info(f"measuring the baselines{again}: raw pixels, colour histogram, random initialisation ...")
        extractors = {"pixels": pixels, "colour_histogram": colour_histogram, "random_init": self._encoder()}
        features = self._features(extractors)
        if features is None:
            return
        self.baselines = {name: self._knn(features[0][name], features[1][name]) for name in extractors}
        write_baselines(self._file, key, self.baselines)

    def measure(self) -> float | None:
        """k-NN percent of the target encoder, None without labels; updates `rankme` and `linear` as well."""
        features = self._features({"trained": self._encoder()})
        if features is None:
            return None
        train, test = self._measured = (features[0]["trained"], features[1]["trained"])
        self.rankme = rankme(test.values["last"])
        if not self._labelled:
            return None
        if self._settings.linear_epochs:
            self.linear, _ = linear_probe(train, test, ["last"], self._settings.linear_epochs, self._device)
        return self._knn(train, test)

    def online(self) -> dict[str, float]:
        """The scores of a measurement during the run, for its log."""
        scores = {"knn": self.measure(), "knn_rankme": self.rankme, "linear": self.linear}
        return {name: value for name, value in scores.items() if value is not None}

    def neighbours(self, count: int, k: int) -> list[Neighbours]:
        """The k nearest training images of `count` validation images, evenly spread, at the last measurement."""
        if self._measured is None or self._loaders is None:
            return []
        train, test = self._measured
        rows = torch.linspace(0, len(test.labels) - 1, min(count, len(test.labels))).long()
        similarities, nearest = nearest_neighbours(train.values["last"], test.values["last"][rows], k, self._device)
        found = []
        for row, others, similar in zip(rows.tolist(), nearest.tolist(), similarities.tolist(), strict=True):
            pictures = [picture(self._loaders[1], row), *(picture(self._loaders[0], other) for other in others)]
            labels = [int(test.labels[row]), *train.labels[others].tolist()]
            found.append(Neighbours(pictures, labels, similar))
        return found

    @property
    def _device(self) -> torch.device:
        return next(self._model.target.parameters()).device

    def _encoder(self) -> Extractor:
        return pooled_features(self._model.target)

    def _knn(self, train: Features, test: Features) -> float:
        k = self._settings.knn_k
        parts = (train.values["last"], train.labels, test.values["last"], test.labels)
        return knn_accuracies(*parts, [k], self._device)[k]

    def _features(self, extractors: dict[str, Extractor]) -> tuple[dict[str, Features], dict[str, Features]] | None:
        """Of the training and of the validation split."""
        if self._loaders is None:
            return None
        self._model.eval()
        try:
            return extract(self._loaders[0], extractors), extract(self._loaders[1], extractors)
        except ValueError as error:
            log.warning("nothing is measured: %s", error)
            self._loaders = None
            return None
        finally:
            self._model.train()


def picture(loader: MultiCropLoader, position: int) -> bytes:
    """The encoded image whose features `extract` has at a position: of a damaged sample, its stand-in."""
    return loader.index.encoded(int(loader.rows_at(0, position, position + 1)[0]))
