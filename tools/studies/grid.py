"""What the study compares: the settings of each variant, and the experiments that they make up."""

from dataclasses import dataclass

LOCAL_CROPS = "data.multicrop.num_local_crops"

# Overrides of the base config, which is `2+6`: 2 globals, 6 locals, global_only, three levels, view term and SIGReg.
VARIANTS: dict[str, tuple[str, ...]] = {
    "2+6": (),
    "2+0": (f"{LOCAL_CROPS}=0",),
    "1+0": ("data.use_multicrop=false",),
    "global_with_local_context": ("masking.strategy=global_with_local_context",),
    "cross_crop_prediction": ("masking.strategy=cross_crop_prediction",),
    "one level": ("model.levels=[{layer: -1, stride: 1, weight: 1.0}]",),
    "no view term": ("loss.view_weight=0.0",),
    "no SIGReg": ("loss.sigreg_weight=0.0",),
    "neither": ("loss.view_weight=0.0", "loss.sigreg_weight=0.0"),
}
TIME, IMAGES = "time", "images"
BASE = "2+6"


@dataclass(frozen=True)
class Trial:
    """One training of the study. `equal`: what it has in common with the base run, `time` or `images`."""

    variant: str
    equal: str
    seed: int


# (title, trials' variants, what is equal, seeds left out when `--seeds` is lower). In the order of their importance.
EXPERIMENTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("a. Crops, equal time", ("1+0", "2+0", BASE), TIME),
    ("a. Crops, equal images", ("1+0", "2+0", BASE), IMAGES),
    ("b. Masking strategies, equal time", (BASE, "global_with_local_context", "cross_crop_prediction"), TIME),
    ("c. Hierarchy, equal time", (BASE, "one level"), TIME),
    ("d. View term and SIGReg, equal time", (BASE, "no view term", "no SIGReg", "neither"), TIME),
)


def same_run(variant: str, equal: str) -> tuple[str, str]:
    """The base run defines both the time and the number of images, so it is made once."""
    return (variant, TIME if variant == BASE else equal)


def trials(first_seeds: int, other_seeds: int) -> list[Trial]:
    """All trainings, seed by seed inside each experiment: `first_seeds` of the crops at equal time, `other_seeds` of the rest."""
    found: dict[Trial, None] = {}
    for number, (_, variants, equal) in enumerate(EXPERIMENTS):
        for seed in range(first_seeds if number == 0 else other_seeds):
            for variant in variants:
                found[Trial(*same_run(variant, equal), seed)] = None
    return list(found)
