"""Defaults that depend on `data.dataset`: small crops and patches for small images; each data set's own mean and std.

The file and the command line override them.
"""

from typing import Any

from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD

Values = dict[str, Any]


def _small(mean: list[float], std: list[float]) -> Values:
    """For images of about 32 pixels, where blur and solarization would leave too little information."""
    augmentation = {"global_blur_prob": 0.0, "local_blur_prob": 0.0, "solarize_prob": 0.0, "mean": mean, "std": std}
    return {
        "data": {"multicrop": {"global_crop_size": 32, "local_crop_size": 16}, "augmentation": augmentation},
        "model": {"encoder": "vit_small_patch16_dinov3", "encoder_kwargs": {"img_size": 32, "patch_size": 4}},
    }


# Means and standard deviations of the training pixels, as published with common training recipes.
DATASETS: dict[str, Values] = {
    "cifar10": _small([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]),
    "cifar100": _small([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "fashion_mnist": _small([0.286, 0.286, 0.286], [0.353, 0.353, 0.353]),
    "sample": _small(list(IMAGENET_MEAN), list(IMAGENET_STD)),
}


def with_dataset_defaults(values: Values) -> Values:
    """`values` with the defaults of its data set for the keys it lacks. Invalid values are kept."""
    data = values.get("data")
    name = data.get("dataset") if isinstance(data, dict) else None
    return merge(DATASETS.get(name, {}) if isinstance(name, str) else {}, values)


def merge(defaults: Values, values: Values) -> Values:
    """`values` over `defaults`, section by section."""
    merged = defaults | values
    for key in defaults.keys() & values.keys() - {"encoder_kwargs"}:  # arguments of one call: all given or all default
        if isinstance(defaults[key], dict) and isinstance(values[key], dict):
            merged[key] = merge(defaults[key], values[key])
    return merged
