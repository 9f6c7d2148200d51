"""Settings of the model: its masks, its parts and its loss."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, StrictInt

from train.config.types import (
    AtLeastZero,
    BrokenRule,
    Count,
    Flag,
    InnerShare,
    Name,
    Positive,
    PositiveRange,
    Scalar,
    Section,
    ShareRange,
    SomeShare,
)


class Masking(Section):
    strategy: Literal["global_only", "global_with_local_context", "cross_crop_prediction"] = "global_only"
    num_masks: Count = 4
    """Target rectangles in each global crop."""
    mask_scale: ShareRange = (0.15, 0.2)
    """Area of a rectangle as a share of the crop."""
    aspect_ratio: PositiveRange = (0.75, 1.5)
    context_ratio: InnerShare = 0.4
    """Share of a global crop's tokens that the encoder keeps."""
    query_ratio: SomeShare = 0.4
    """Share of a global crop's tokens that are predicted."""
    exclude_covered: Flag = False
    """Leave cells that a local crop or the context crop covers out of the loss; not for global_only."""

    def rules(self) -> Iterator[BrokenRule]:
        if self.context_ratio + self.query_ratio > 1 + 1e-9:
            total = f"{self.context_ratio} + {self.query_ratio}"
            keys = ("query_ratio", "context_ratio")
            yield keys, f"context_ratio + query_ratio = {total} is over 1, and no token is both; lower one"
        if self.exclude_covered and self.strategy == "global_only":
            keys = ("exclude_covered", "strategy")
            yield keys, "true has no effect with global_only, whose predictor sees no other crop; write false"


class Level(Section):
    layer: StrictInt
    """Encoder block whose output is the target; negative counts from the end."""
    stride: Count
    weight: Positive


class Model(Section):
    encoder: Name = "vit_base_patch16_dinov3"
    """A timm model name."""
    encoder_kwargs: dict[str, Scalar] = Field(default_factory=dict)
    """Passed on to timm.create_model."""
    predictor_width: Count = 384
    predictor_depth: Count = 6
    predictor_heads: Count = 6
    levels: tuple[Level, ...] | None = None
    """null: three levels spread over the depth, strides 1, 2, 4 and weights 1.0, 0.5, 0.25."""
    projector_hidden: Count = 2048
    projector_dim: Count = 256
    grad_checkpointing: Flag = False
    """Keep one activation for each block of encoder and predictor and compute the rest again: less memory, more time."""

    @property
    def patch_size(self) -> int | None:
        """Pixels, where the settings tell it."""
        named = re.search(r"patch(\d+)", self.encoder)
        size = self.encoder_kwargs.get("patch_size", int(named[1]) if named else None)
        return size if isinstance(size, int) and size > 0 else None

    def rules(self) -> Iterator[BrokenRule]:
        if self.predictor_width % self.predictor_heads:
            keys = ("predictor_heads", "predictor_width")
            yield keys, f"{self.predictor_heads} does not divide predictor_width = {self.predictor_width}"
        for name in sorted({"mean", "std"} & self.encoder_kwargs.keys()):
            yield ("encoder_kwargs",), f"{name} is none of timm's; write data.augmentation.{name}"
        if self.levels == ():
            yield ("levels",), "is an empty list; write null for three default levels, or list some"


class Loss(Section):
    view_weight: AtLeastZero = 1.0
    sigreg_weight: AtLeastZero = 0.05
    sigreg_slices: Count = 256
    sigreg_knots: Annotated[StrictInt, Field(ge=2)] = 17
