"""The method: crops in, named losses out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.masks import MaskPlan, MultiCropMaskGenerator

__all__ = ["MaskPlan", "MultiCropMaskGenerator"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds to load, and the config schema needs only `model.defaults`.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("model.masks"), name)
