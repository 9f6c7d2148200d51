"""Bytes on disk -> a `CropBatch` of tensors on the device."""

from pipeline.batch import CropBatch
from pipeline.dataset import build_multicrop_dataloader, build_multicrop_dataset

__all__ = ["CropBatch", "build_multicrop_dataloader", "build_multicrop_dataset"]
