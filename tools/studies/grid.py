"""What the study compares: the settings of each variant, and the experiments that they make up."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

LOCAL_CROPS = "data.multicrop.num_local_crops"
NO_PREDICTION = "loss.prediction_weight=0.0"
NO_SUMMARY = "loss.summary_weight=0.0"
UNMASKED = ("masking.strategy=none", NO_PREDICTION)
MASKED = ("loss.prediction_weight=1.0", "masking.context_ratio=0.5", "masking.query_ratio=0.5")
ONE_LEVEL = "model.levels=[{layer: -1, stride: 1, weight: 1.0}]"
NO_VIEW, NO_SIGREG = "loss.view_weight=0.0", "loss.sigreg_weight=0.0"

# Overrides of the base config, which is `2+6`: 2 globals, 6 locals, three levels. Variants of masking predict tokens.
VARIANTS: dict[str, tuple[str, ...]] = {
    "2+6": (),
    "2+0": (f"{LOCAL_CROPS}=0",),
    "1+0": ("data.use_multicrop=false",),
    "global_only": ("masking.strategy=global_only", *MASKED),
    "global_with_local_context": ("masking.strategy=global_with_local_context", *MASKED),
    "cross_crop_prediction": ("masking.strategy=cross_crop_prediction", *MASKED),
    "summary, a quarter masked": (
        "masking.strategy=global_only",
        NO_PREDICTION,
        "masking.context_ratio=0.75",
        "masking.query_ratio=0.25",
    ),
    "tokens, no summary": ("masking.strategy=global_only", NO_SUMMARY, *MASKED),
    "one level": (ONE_LEVEL,),
    "no view term": (NO_VIEW,),
    "no SIGReg": (NO_SIGREG,),
    "neither": (NO_VIEW, NO_SIGREG),
}
# Other methods, on the same crops with the same encoder: the first two are settings of ours, for the others see `peers.py`.
PEERS: dict[str, tuple[str, ...]] = {
    "lejepa": (NO_SUMMARY, *UNMASKED),
    "ijepa": (
        "data.use_multicrop=false",
        "masking.strategy=global_only",
        *MASKED,
        NO_VIEW,
        NO_SIGREG,
        NO_SUMMARY,
        ONE_LEVEL,
    ),
    "dino": (NO_SUMMARY, *UNMASKED),
    "supervised": (NO_SUMMARY, *UNMASKED),
}
TIME, IMAGES = "time", "images"
BASE = "2+6"


@dataclass(frozen=True)
class Base:
    """What all variants start from: a run's YAML file, and overrides for all of them."""

    config: str
    overrides: tuple[str, ...] = ()

    def settings(self, variant: str) -> tuple[str, ...]:
        return (*self.overrides, *(VARIANTS | PEERS)[variant])


@dataclass(frozen=True)
class Trial:
    """One training of the study. `equal`: what it has in common with the base run, `time` or `images`."""

    variant: str
    equal: str
    seed: int


# (title, trials' variants, what is equal, seeds left out when `--seeds` is shorter). In the order of their importance.
EXPERIMENTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("a. Crops, equal time", ("1+0", "2+0", BASE), TIME),
    ("a. Crops, equal images", ("1+0", "2+0", BASE), IMAGES),
    (
        "b. Masking strategies, equal time",
        (BASE, "global_only", "global_with_local_context", "cross_crop_prediction"),
        TIME,
    ),
    ("c. Hierarchy, equal time", (BASE, "one level"), TIME),
    ("d. View term and SIGReg, equal time", (BASE, "no view term", "no SIGReg", "neither"), TIME),
)


def same_run(variant: str, equal: str) -> tuple[str, str]:
    """The base run defines both the time and the number of images, so it is made once."""
    return (variant, TIME if variant == BASE else equal)


def trials(first_seeds: Sequence[int], other_seeds: Sequence[int]) -> list[Trial]:
    """All trainings, seed by seed inside each experiment: `first_seeds` of the crops at equal time, `other_seeds` of the rest."""
    found: dict[Trial, None] = {}
    for number, (_, variants, equal) in enumerate(EXPERIMENTS):
        for seed in other_seeds if number else first_seeds:
            for variant in variants:
                found[Trial(*same_run(variant, equal), seed)] = None
    return list(found)


def arena_trials(variants: Sequence[str], seeds: Sequence[int], equals: Sequence[str] = (TIME, IMAGES)) -> list[Trial]:
    """Every variant at equal time and at equal images, seed by seed, so that a stopped arena has compared all of them."""
    order = ((seed, equal, variant) for seed in seeds for equal in equals for variant in variants)
    return list(dict.fromkeys(Trial(*same_run(variant, equal), seed) for seed, equal, variant in order))


def check_installed(variants: Iterable[str]) -> None:
    """ValueError for a variant whose library is not installed."""
    if "dino" in variants and find_spec("lightly") is None:
        raise ValueError(
            "dino: its loss is lightly's, which is not installed; pip install -e '.[arena]', or name variants without it"
        )
