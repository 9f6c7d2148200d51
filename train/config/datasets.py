"""Defaults that `data.dataset` chooses: for small images, small crops and patches; and each data set's own mean and std.

What a file or the command line says goes before them.
"""

from copy import deepcopy
from typing import Any

Values = dict[str, Any]


def _small(mean: list[float], std: list[float]) -> Values:
    """For images of about 32 pixels: a blurred or solarized crop of that size has little left to tell."""
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
    "sample": _small([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def with_dataset_defaults(values: Values) -> Values:
    """A copy of a file's values with the defaults of its data set where it is silent. Wrong values are left as they are."""
    data = values.get("data")
    name = data.get("dataset") if isinstance(data, dict) else None
    return _merged(DATASETS.get(name, {}) if isinstance(name, str) else {}, values)


def _merged(below: Values, above: Values) -> Values:
    merged = deepcopy(below)
    for key, value in above.items():
        under = merged.get(key)
        # Arguments of timm.create_model belong together: given at all, they are given whole.
        if isinstance(under, dict) and isinstance(value, dict) and key != "encoder_kwargs":
            merged[key] = _merged(under, value)
        else:
            merged[key] = value
    return merged


def is_dataset_default(dataset: str, path: tuple[str | int, ...]) -> bool:
    """Whether `dataset` has its own default for the key at `path`."""
    node: Any = DATASETS.get(dataset)
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
