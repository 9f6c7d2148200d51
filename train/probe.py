"""k-NN on frozen features before, during and after a run, next to baselines that need no training."""

import json
from collections.abc import Callable
from pathlib import Path

from model.hjepa import HJEPA
from pipeline.loader import MultiCropLoader
from train.build import build_evaluation_loaders
from train.config import Config
from train.evaluate import Extractor, colour_histogram, knn_table, pixels, pooled_features
from train.metrics import rankme


class Probe:
    """Measures the target encoder of `model`; without a labelled validation split it says so once and measures nothing."""

    def __init__(self, config: Config, folder: Path, model: HJEPA, say: Callable[[str], None]) -> None:
        self._model, self._settings, self._file = model, config.evaluation, folder / "baselines.json"
        self._say = say
        self.baselines: dict[str, float] | None = None
        self.rankme: float | None = None
        self._loaders: tuple[MultiCropLoader, MultiCropLoader] | None = None
        try:
            self._loaders = build_evaluation_loaders(config)
        except FileNotFoundError as error:
            say(f"no k-NN: {error}")

    def measure_baselines(self) -> None:
        """Raw pixels, colour histogram and the model as it is now, its initialisation; kept in baselines.json."""
        if self._loaders is None:
            return
        if not self._file.exists():
            self._say("measuring the baselines: raw pixels, colour histogram, random initialisation ...")
            scores = self._scores(
                {"pixels": pixels, "colour_histogram": colour_histogram, "random_init": self._encoder()}
            )
            if scores is None:
                return
            self._file.write_text(json.dumps(scores, indent=1) + "\n")
        self.baselines = json.loads(self._file.read_text())

    def measure(self) -> float | None:
        """k-NN percent of the target encoder now; also refreshes `rankme` of its validation features."""
        scores = self._scores({"trained": self._encoder()})
        return None if scores is None else scores["trained"]

    def online(self) -> dict[str, float]:
        """The figures of a measurement during the run, for its log."""
        score = self.measure()
        return {} if score is None or self.rankme is None else {"knn": score, "knn_rankme": self.rankme}

    def _encoder(self) -> Extractor:
        return pooled_features(self._model.target)

    def _scores(self, extractors: dict[str, Extractor]) -> dict[str, float] | None:
        if self._loaders is None:
            return None
        self._model.eval()
        try:
            scores, features = knn_table(*self._loaders, extractors, self._settings.knn_k, self._settings.max_samples)
        except ValueError as error:
            self._say(f"no k-NN: {error}")
            self._loaders = None
            return None
        finally:
            self._model.train()
        if "trained" in features:
            self.rankme = rankme(features["trained"])
        return scores
