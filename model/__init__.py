"""Tensors -> named losses."""

from model.masks import MaskPlan, MultiCropMaskGenerator

__all__ = ["MaskPlan", "MultiCropMaskGenerator"]
