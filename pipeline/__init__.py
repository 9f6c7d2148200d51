"""Bytes on disk -> a `CropBatch` of tensors on the device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.crops.augment import Augmentation
    from pipeline.dataset import CropBatch, build_multicrop_dataset
    from pipeline.loader import build_multicrop_dataloader

__all__ = ["Augmentation", "CropBatch", "build_multicrop_dataloader", "build_multicrop_dataset"]
HOMES = {"Augmentation": "pipeline.crops.augment", "build_multicrop_dataloader": "pipeline.loader"}


def __getattr__(name: str) -> Any:
    # On first use: torch and DALI take seconds to import, and commands that only read an index need neither.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES.get(name, "pipeline.dataset")), name)
