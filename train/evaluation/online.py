"""Scores of frozen features before, during and after a run, and baselines that need no training (baselines.json)."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, Field
from safetensors.torch import save

from model.hjepa import HJEPA
from pipeline.files import write_atomic
from pipeline.loader import MultiCropLoader
from pipeline.shards.index import UNLABELLED, ShardIndex
from pipeline.shards.manifest import as_model, read_manifest, read_object
from pipeline.text import printable
from train.build import build_encoder, build_evaluation_loaders
from train.config.schema import Config, Evaluation
from train.evaluation.features import Extractor, check_labels, colour_histogram, pixels, pooled_features
from train.evaluation.measure import Scores, leave_one_out_hits, measure, nearest_neighbours
from train.evaluation.placement import EVALUATED_PER_PAIR, MAX_IMAGES, MIN_IMAGES, Placement, dense_features

if TYPE_CHECKING:
    from train.adapt.weights import Start

BASELINES_FILE = "baselines.json"
BaselineName = Literal["pixels", "colour_histogram", "random_init", "start"]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]

log = logging.getLogger(__name__)


class Baselines(BaseModel, strict=True):
    """The content of baselines.json: k-NN accuracies, and what they depend on and a run may change."""

    measured_on: dict[str, Any]
    weights: str | None = None
    knn: Annotated[dict[BaselineName, Percent], Field(min_length=3)]


class Neighbours(NamedTuple):
    """An image and its nearest others, the image first: files, labels and captions, and the others' cosine similarities.

    A caption has a line with the class, unless there are no labels, and one with the name of the file.
    """

    pictures: list[bytes]
    labels: list[int]
    captions: list[str]
    similarities: list[float]


class OnlineEvaluation:
    """Measures the target encoder of `model` on the validation split. Without that split it warns once and measures nothing.

    If the images have no labels, or all the same one, there are `placement`, `rankme` and `neighbours`, but no other accuracies.
    Raises ValueError when the labels of the two splits mean different classes. Accuracies are percentages, None until they are
    measured. `placement` holds them for chance, raw pixels, the encoder before training, the trained one and its levels.
    """

    def __init__(self, config: Config, folder: Path, model: HJEPA, start: "Start | None" = None) -> None:
        self._config, self._model, self._start = config, model, start
        self._settings, self._file = config.evaluation, folder / BASELINES_FILE
        self._device = next(model.target.parameters()).device
        self.baselines: dict[str, float] | None = None
        self.knn = self.linear = self.rankme = cast(float | None, None)
        self.placement: dict[str, float] = {}
        self._pairs: Placement | None = None
        self.mixtures: dict[float, float] = {}
        self.share: float | None = None
        self._latest: Scores | None = None
        self._loaders: tuple[MultiCropLoader, MultiCropLoader] | None = None
        self._labelled, self.one_label, self.num_validation = False, False, 0
        try:
            self._loaders = build_evaluation_loaders(config)
        except FileNotFoundError as error:
            log.warning("no validation images, so nothing is measured: %s", error)
            return
        self._train, self._val = (loader.index for loader in self._loaders)
        self.num_validation = len(self._val)
        problems = check_labels(self._train, self._val)
        self.one_label, self._labelled = bool(problems.one_label), not (problems.one_label or problems.missing)
        if not self._labelled:
            log.warning(
                "no accuracies of classes, only placement, RankMe and neighbours: %s", problems.missing or problems.one_label
            )
        elif problems.unknown:
            log.warning(problems.unknown)

    def measure_baselines(self) -> None:
        """Measure k-NN of pixels, colour histogram, random initialisation and starting weights. Call it before training.

        The accuracies are kept in baselines.json, and measured again for other images or evaluation settings. Placement, which
        takes a moment, is measured at every start.
        """
        self._place("random_init" if self._start is None else "start")
        if not self._labelled:
            if self._start is not None and (scores := self._measure({"start": pooled_features(self._model.target)})):
                self._describe(scores["start"])
            return
        key = baselines_key(self._train, self._val, self._settings)
        weights = None if self._start is None else self._start.digest
        try:
            self.baselines = read_baselines(self._file, key, weights)
        except ValueError as error:
            log.warning("%s", error)
        if self.baselines is not None:
            return
        again = f" again, since {self._file} is of other images or settings" if self._file.exists() else ""
        log.info(f"measuring the baselines{again}: raw pixels, colour histogram, random initialisation ...")
        extractors: dict[str, Extractor] = {"pixels": pixels, "colour_histogram": colour_histogram}
        if self._start is not None:
            extractors["random_init"] = pooled_features(build_encoder(self._config).eval().to(self._device))
        extractors["random_init" if self._start is None else "start"] = pooled_features(self._model.target)
        scores = self._measure(extractors)
        if scores is not None:
            if "start" in scores:
                self._describe(scores["start"])
            self.baselines = {name: row.knn["last"][self._settings.knn_k] for name, row in scores.items()}
            baselines = Baselines.model_validate({"measured_on": key, "weights": weights, "knn": self.baselines})
            write_atomic(self._file, baselines.model_dump_json(indent=1) + "\n")

    def _describe(self, start: Scores) -> None:
        from train.adapt.mix import described, uniformity

        log.info(described(uniformity(start.train.values["last"])))

    def mix_back(self, path: Path, step: int) -> None:
        """Write the best mixture of target and starting weights to `path`, and note its `share` and the k-NN of all `mixtures`.

        The training images choose it, by k-NN without the image itself, so that the validation images measure what they have
        not chosen; see `best_share`. Nothing is done without labels or starting weights.
        """
        if self._start is None or not self._labelled:
            return
        from train.adapt.mix import best_share, mixtures
        from train.adapt.weights import starting_encoder

        start = starting_encoder(self._config, self._device, self._start)
        encoders = mixtures(start, self._model.target)
        scores = self._measure({str(share): pooled_features(encoder) for share, encoder in encoders.items()})
        if scores is None:
            return
        k = self._settings.knn_k
        self.mixtures = {share: scores[str(share)].knn["last"][k] for share in encoders}
        hits = {share: leave_one_out_hits(scores[str(share)].train, k, self._device) for share in encoders}
        self.share = best = best_share(hits)
        state = {name: value.cpu().contiguous() for name, value in encoders[best].vit.state_dict().items()}
        write_atomic(path, save(state, {"step": str(step)}))  # one key: safetensors writes several in a random order
        knn = {share: (100 * float(hits[share].double().mean()), self.mixtures[share]) for share in encoders}
        shown = ", ".join(f"{share:.0%}: {within:.1f} % ({outside:.1f} %)" for share, (within, outside) in knn.items())
        text = "mixed back with the starting weights, k-NN among the training images (of the validation images) by share of the "
        log.info(f"{text}trained encoder: {shown}; {best:.0%} is exported")

    @property
    def scores(self) -> dict[str, float] | None:
        """The latest k-NN accuracies: of the baselines, as `trained` of the target encoder, as `mixed` of what is exported."""
        best = {} if self.share is None else {"mixed": self.mixtures[self.share]}
        return None if self.knn is None or self.baselines is None else {**self.baselines, "trained": self.knn, **best}

    @property
    def measured_on(self) -> dict[str, Any] | None:
        """The data and settings that the scores depend on besides the encoder; None without a validation split."""
        if self._loaders is None:
            return None
        return {**baselines_key(self._train, self._val, self._settings), "linear_epochs": self._settings.linear_epochs}

    def measure(self) -> dict[str, float]:
        """Measure the target encoder: update `knn`, `linear`, `rankme` and `placement`, and return what there is for the log."""
        epochs = self._settings.linear_epochs if self._labelled else 0
        scores = self._measure({"trained": pooled_features(self._model.target)}, linear_epochs=epochs, with_rankme=True)
        if scores is None:
            return {}
        self._latest = trained = scores["trained"]
        self.rankme, self.linear = trained.rankme, trained.linear[0] if trained.linear else None
        self.knn = trained.knn["last"][self._settings.knn_k] if self._labelled else None
        self._place("trained")
        values = {"knn": self.knn, "knn_rankme": self.rankme, "linear": self.linear, "placement": self.placement.get("trained")}
        values |= {f"placement_{name}": value for name, value in self.placement.items() if name.startswith("level")}
        return {name: value for name, value in values.items() if value is not None}

    def neighbours(self, count: int, k: int) -> list[Neighbours]:
        """Return the k nearest training images, at the latest measurement, of `count` evenly spaced validation images."""
        if self._latest is None or self._loaders is None:
            return []
        train, test = self._latest.train, self._latest.test
        rows = torch.linspace(0, len(test.labels) - 1, min(count, len(test.labels))).long()
        similarities, nearest = nearest_neighbours(train.values["last"], test.values["last"][rows], k, self._device)
        manifest, neighbours = read_manifest(self._train.folder), []
        classes = manifest.classes if manifest else ()
        for row, others, similar in zip(rows.tolist(), nearest.tolist(), similarities.tolist(), strict=True):
            of_each = [(self._loaders[1], row), *((self._loaders[0], other) for other in others)]
            # A damaged sample's row is that of its replacement.
            places = [(loader.index, int(loader.rows_at(0, at, at + 1)[0])) for loader, at in of_each]
            labels, captions = [int(test.labels[row]), *train.labels[others].tolist()], []
            for (index, stored), label in zip(places, labels, strict=True):
                known = [classes[label] if label < len(classes) else f"class {label}"] if label != UNLABELLED else []
                captions.append("\n".join(map(printable, (*known, index.name(stored).rpartition("/")[2]))))
            neighbours.append(Neighbours([index.encoded(stored) for index, stored in places], labels, captions, similar))
        return neighbours

    def _place(self, name: str) -> None:
        """Measure the placement accuracy of the target encoder, as `name`; of its levels only once it is trained."""
        if self._loaders is None:
            return
        encoder, levels = self._model.target, self._model.levels if name == "trained" else ()
        self._model.eval()
        try:
            if self._pairs is None:
                affordable = (len(self._train) + len(self._val)) // EVALUATED_PER_PAIR
                self._pairs = Placement(self._config, self._val, min(max(affordable, MIN_IMAGES), MAX_IMAGES))
                self.placement = self._pairs.baselines(encoder.patch_size)
            scores = self._pairs.measure(dense_features(encoder, levels))
            self.placement |= {name: scores.pop("last"), **scores}
        except ValueError as error:
            log.warning("no placement accuracy: %s", error)
        finally:
            self._model.train()

    def _measure(self, extractors: dict[str, Extractor], **settings: Any) -> dict[str, Scores] | None:
        """Return the scores, or None without a validation split or when the features do not fit in memory."""
        if self._loaders is None:
            return None
        ks = [self._settings.knn_k] if self._labelled else []
        self._model.eval()  # train() again below, whatever happens: this also runs between training steps
        try:
            return measure(self._loaders, extractors, self._device, ks=ks, **settings)
        except ValueError as error:
            log.warning("nothing is measured: %s", error)
            self._loaders = None
            return None
        finally:
            self._model.train()


def baselines_key(train: ShardIndex, val: ShardIndex, settings: Evaluation) -> dict[str, Any]:
    """Return `measured_on`: the images in use of both splits, and two settings."""
    return {"train": train.digest, "val": val.digest, "knn_k": settings.knn_k, "crop_ratio": settings.crop_ratio}


def read_baselines(path: Path, key: dict[str, Any], weights: str | None = None) -> dict[str, float] | None:
    """Return accuracies on `key` and of starting `weights`; None if the file is of others. Raises ValueError if it is damaged."""
    remedy = "The baselines are measured again"
    try:
        baselines = as_model(Baselines, read_object(path, remedy), path, remedy)
    except FileNotFoundError:
        return None
    is_same = (baselines.measured_on, baselines.weights) == (key, weights)
    return {str(name): accuracy for name, accuracy in baselines.knn.items()} if is_same else None
