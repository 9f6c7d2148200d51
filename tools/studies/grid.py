"""The variants of study and arena with their settings, and the trainings that compare them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from train.config.load import read_values

TIME, IMAGES = "time", "images"
TITLES = {TIME: "equal CPU time", IMAGES: "equal images"}
BASE = "2+6"

LOCAL_CROPS = "data.multicrop.num_local_crops"
NO_PREDICTION = "loss.prediction_weight=0.0"
COLOUR = "loss.colour_weight=1.0"
NO_SUMMARY = "loss.summary_weight=0.0"
UNMASKED = ("masking.strategy=none", NO_PREDICTION)
STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")
GLOBAL_ONLY, LOCALS_TOO, CROSS_CROP = (f"masking.strategy={name}" for name in STRATEGIES)
WHITENED = "loss.whiten_targets=true"
ONE_LEVEL = "model.levels=[{layer: -1, stride: 1, weight: 1.0}]"
NO_VIEW, NO_SIGREG = "loss.view_weight=0.0", "loss.sigreg_weight=0.0"


def masked(prediction_weight: float) -> tuple[str, ...]:
    return (f"loss.prediction_weight={prediction_weight}", "masking.context_ratio=0.5", "masking.query_ratio=0.5")


MASKED = masked(1.0)

# Overrides of the base config, which is `2+6`: 2 globals, 6 locals, three levels. Masked variants predict tokens.
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "2+0": (f"{LOCAL_CROPS}=0",),
    "1+0": ("data.use_multicrop=false",),
    "global_only": (GLOBAL_ONLY, *MASKED),
    "global_with_local_context": (LOCALS_TOO, *MASKED),
    "cross_crop_prediction": (CROSS_CROP, *MASKED),
    **{f"tokens {weight}": (GLOBAL_ONLY, NO_SUMMARY, *masked(weight)) for weight in (1, 5, 20, 60)},
    "tokens 20 + summary": (GLOBAL_ONLY, "loss.summary_weight=10.0", *masked(20)),
    "tokens 20 + locals as context": (LOCALS_TOO, NO_SUMMARY, *masked(20)),
    "tokens 20 + cross crop": (CROSS_CROP, NO_SUMMARY, *masked(20)),
    "tokens 20 + one level": (GLOBAL_ONLY, NO_SUMMARY, *masked(20), ONE_LEVEL),
    "tokens 20 + 2+0": (GLOBAL_ONLY, NO_SUMMARY, *masked(20), f"{LOCAL_CROPS}=0"),
    "whitened tokens 5": (LOCALS_TOO, NO_SUMMARY, WHITENED, *masked(5)),
    "tokens 5 + locals as context": (LOCALS_TOO, NO_SUMMARY, *masked(5)),
    "colour": (NO_SUMMARY, *UNMASKED, COLOUR),
    "colour + 2+0": (NO_SUMMARY, *UNMASKED, COLOUR, f"{LOCAL_CROPS}=0"),
    "colour + tokens 20": (GLOBAL_ONLY, NO_SUMMARY, COLOUR, *masked(20)),
    "colour + tokens 20 + locals as context": (LOCALS_TOO, NO_SUMMARY, COLOUR, *masked(20)),
    "colour + whitened tokens 5": (LOCALS_TOO, NO_SUMMARY, COLOUR, WHITENED, *masked(5)),
    "one level": (ONE_LEVEL,),
    "no view term": (NO_VIEW,),
    "no SIGReg": (NO_SIGREG,),
    "neither": (NO_VIEW, NO_SIGREG),
}
# Other methods on the same crops with the same encoder. The first two are settings of ours; `peers.py` has the others. Each has
# the best of the learning rates tried on held-out images of Fashion-MNIST (docs/method.md): the base's 1.6e-2, or its own here.
PEERS: dict[str, tuple[str, ...]] = {
    "lejepa": (NO_SUMMARY, *UNMASKED),
    "ijepa": ("data.use_multicrop=false", GLOBAL_ONLY, *MASKED, NO_VIEW, NO_SIGREG, NO_SUMMARY, ONE_LEVEL, "training.lr=4e-3"),
    "dino": (NO_SUMMARY, *UNMASKED),
    "supervised": (NO_SUMMARY, *UNMASKED),
}
# Variants that continue from `Base.weights`: what they change in configs/continue.yaml.
CONTINUED, UNTOUCHED = "continued", "untouched weights"
ALL_BLOCKS, NO_ANCHOR = "training.train_blocks=all", "loss.anchor_weight=0.0"
CONTINUING: dict[str, tuple[str, ...]] = {
    CONTINUED: (),
    "all blocks at lr 1e-3": (ALL_BLOCKS, "training.lr=1e-3", NO_ANCHOR),
    "all blocks by Muon": (ALL_BLOCKS, "training.optimizer=muon", "training.lr=4e-3", NO_ANCHOR),
    "views": (NO_SUMMARY,),
    "masked prediction": (GLOBAL_ONLY, *MASKED, NO_SUMMARY, NO_VIEW, NO_SIGREG),
    "views + masked prediction": (GLOBAL_ONLY, *MASKED, NO_SUMMARY),
}
# (title, variants, what is equal), most important first
EXPERIMENTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("a. Crops, equal time", ("1+0", "2+0", BASE), TIME),
    ("a. Crops, equal images", ("1+0", "2+0", BASE), IMAGES),
    ("b. Masking strategies, equal time", (BASE, *STRATEGIES), TIME),
    ("c. Hierarchy, equal time", (BASE, "one level"), TIME),
    ("d. View term and SIGReg, equal time", (BASE, "no view term", "no SIGReg", "neither"), TIME),
)


@dataclass(frozen=True)
class Base:
    """The YAML file that all variants start from, and overrides for all of them.

    `masks`: of the dense probe; `weights`: what the variants of CONTINUING start from; none, if empty.
    """

    config: str
    overrides: tuple[str, ...] = ()
    masks: str = ""
    weights: str = ""

    def settings(self, variant: str) -> tuple[str, ...]:
        """Return those of the variant; an override of one of them wins."""
        start = (*recipe(), f"model.weights={self.weights}") if variant in CONTINUING else ()
        given = (*start, *(VARIANTS | PEERS | CONTINUING)[variant], *self.overrides)
        return tuple({setting.partition("=")[0]: setting for setting in given}.values())


@cache
def recipe() -> tuple[str, ...]:
    """Return the settings of configs/continue.yaml for masks, losses and training."""
    values = read_values(Path(__file__).parents[2] / "configs" / "continue.yaml", {})
    found = {f"{part}.{key}": value for part in ("masking", "loss", "training") for key, value in values[part].items()}
    steps = ("training.epochs", "training.max_steps")  # each trial sets them itself
    return tuple(f"{key}={json.dumps(value)}" for key, value in found.items() if key not in steps)


Run = tuple[str, str]
"""A variant, and what it has in common with the base: `time` or `images`; "" for a baseline."""


class Trial(NamedTuple):
    """One training: a `Run` and its seed."""

    variant: str
    equal: str
    seed: int


def plan_sections(variants: Sequence[str] = (), equals: Sequence[str] = ()) -> dict[str, list[Run]]:
    """Return the runs of each table by its title: those of the arena or, without variants, of the study's EXPERIMENTS."""
    planned = [(f"At {TITLES[equal]}", variants, equal) for equal in equals] if variants else EXPERIMENTS
    # The base defines both time and images, so it is trained once.
    return {title: [(name, TIME if name == BASE else equal) for name in names] for title, names, equal in planned}


def plan_trials(sections: dict[str, list[Run]], seeds: Sequence[int]) -> list[Trial]:
    """Return each training once, seed by seed, so that what is stopped early has compared all variants."""
    return list(dict.fromkeys(Trial(*run, seed) for seed in seeds for runs in sections.values() for run in runs))
