"""The variants of the study with their settings, and the experiments that group them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

TIME, IMAGES = "time", "images"
BASE = "2+6"

LOCAL_CROPS = "data.multicrop.num_local_crops"
NO_PREDICTION = "loss.prediction_weight=0.0"
NO_SUMMARY = "loss.summary_weight=0.0"
UNMASKED = ("masking.strategy=none", NO_PREDICTION)
GLOBAL_ONLY = "masking.strategy=global_only"
MASKED = ("loss.prediction_weight=1.0", "masking.context_ratio=0.5", "masking.query_ratio=0.5")
ONE_LEVEL = "model.levels=[{layer: -1, stride: 1, weight: 1.0}]"
NO_VIEW, NO_SIGREG = "loss.view_weight=0.0", "loss.sigreg_weight=0.0"

# Overrides of the base config, which is `2+6`: 2 globals, 6 locals, three levels. Masked variants predict tokens.
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "2+0": (f"{LOCAL_CROPS}=0",),
    "1+0": ("data.use_multicrop=false",),
    "global_only": (GLOBAL_ONLY, *MASKED),
    "global_with_local_context": ("masking.strategy=global_with_local_context", *MASKED),
    "cross_crop_prediction": ("masking.strategy=cross_crop_prediction", *MASKED),
    "summary, a quarter masked": (*(GLOBAL_ONLY, NO_PREDICTION, "masking.context_ratio=0.75", "masking.query_ratio=0.25"),),
    "tokens, no summary": (GLOBAL_ONLY, NO_SUMMARY, *MASKED),
    "one level": (ONE_LEVEL,),
    "no view term": (NO_VIEW,),
    "no SIGReg": (NO_SIGREG,),
    "neither": (NO_VIEW, NO_SIGREG),
}
# Other methods on the same crops with the same encoder. The first two are settings of ours; `peers.py` has the others.
PEERS: dict[str, tuple[str, ...]] = {
    "lejepa": (NO_SUMMARY, *UNMASKED),
    "ijepa": ("data.use_multicrop=false", GLOBAL_ONLY, *MASKED, NO_VIEW, NO_SIGREG, NO_SUMMARY, ONE_LEVEL),
    "dino": (NO_SUMMARY, *UNMASKED),
    "supervised": (NO_SUMMARY, *UNMASKED),
}
STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")
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
    """The YAML file that all variants start from, and overrides for all of them."""

    config: str
    overrides: tuple[str, ...] = ()

    def settings(self, variant: str) -> tuple[str, ...]:
        return (*self.overrides, *(VARIANTS | PEERS)[variant])


class Trial(NamedTuple):
    """One training of the study. `equal`: what it shares with the base variant, `time` or `images`."""

    variant: str
    equal: str
    seed: int


def same_run(variant: str, equal: str) -> tuple[str, str]:
    """Return the (variant, equal) that is trained: the base variant defines both time and images, so it is trained once."""
    return (variant, TIME if variant == BASE else equal)


def study_trials(seeds: Sequence[int]) -> list[Trial]:
    """Return all trainings of the study, seed by seed in each experiment."""
    planned = (
        Trial(*same_run(variant, equal), seed) for _, variants, equal in EXPERIMENTS for seed in seeds for variant in variants
    )
    return list(dict.fromkeys(planned))


def arena_trials(variants: Sequence[str], seeds: Sequence[int], equals: Sequence[str] = (TIME, IMAGES)) -> list[Trial]:
    """Return all trainings of the arena, seed by seed, so that a stopped arena has compared all variants."""
    order = ((seed, equal, variant) for seed in seeds for equal in equals for variant in variants)
    return list(dict.fromkeys(Trial(*same_run(variant, equal), seed) for seed, equal, variant in order))
