"""Every setting of a run: its key, type and default, and the rules between keys.

`python -m train.config --schema` prints them. Ratios are shares in 0..1, sizes are pixels.
`train/config_file.py` reads them from YAML.
"""

import argparse
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from train.config_yaml import refuse_ambiguous, to_text

# Strict, because pydantic would otherwise take "32" for 32, 1 for true and 2.0 for 2.
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
AtLeastZero = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
SomeShare = Annotated[float, Field(strict=True, gt=0, le=1)]
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
# Beyond 2 the hue shift (a quarter of the strength) would leave its range of -0.5..0.5.
JitterStrength = Annotated[float, Field(strict=True, ge=0, le=2)]
Place = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", json_schema_extra={"allowed": "a path"})]
FolderName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$",
        json_schema_extra={"allowed": "a folder name of letters, digits, . _ - (not starting with . or -)"},
    ),
]
Scalar = Annotated[
    Flag | Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)] | str | None, refuse_ambiguous
]


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the first of [{pair[0]}, {pair[1]}] is the greater; write [low, high]")
    return pair


ShareRange = Annotated[tuple[SomeShare, SomeShare], AfterValidator(_in_order)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_in_order)]
PerGlobal = Share | tuple[Share, ...]


class Section(BaseModel):
    """A frozen group of keys; `rules` says what must hold between them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def rules(self) -> Iterator[tuple[str, str]]:
        """(key within this section, what is wrong), for every rule between keys that does not hold."""
        return iter(())

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        broken: list[InitErrorDetails] = [
            {"type": PydanticCustomError("rule", "{text}", {"text": text}), "loc": tuple(key.split(".")), "input": None}
            for key, text in self.rules()
        ]
        if broken:
            raise ValidationError.from_exception_data(type(self).__name__, broken)
        return self


class MultiCrop(Section):
    num_global_crops: Count = 2
    num_local_crops: Whole = 6
    global_crop_size: Count = 224
    local_crop_size: Count = 96
    global_crop_scale: ShareRange = (0.4, 1.0)
    """Area of a crop as a share of its source image."""
    local_crop_scale: ShareRange = (0.05, 0.4)
    global_color_jitter: JitterStrength = 0.4
    """Strength s: brightness and contrast s, saturation s/2, hue s/4."""
    local_color_jitter: JitterStrength = 0.4


class Augmentation(Section):
    flip_prob: Share = 0.5
    color_jitter_prob: Share = 0.8
    gray_prob: Share = 0.2
    global_blur_prob: PerGlobal = (1.0, 0.1)
    """One for each global crop, or a single number for all."""
    local_blur_prob: Share = 0.5
    blur_sigma: PositiveRange = (0.1, 2.0)
    solarize_prob: PerGlobal = (0.0, 0.2)
    """One for each global crop, or a single number for all."""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class Data(Section):
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "sample", "custom"] = "imagenet"
    data_path: Place
    """Folder that holds train/ and val/ with their shards."""
    batch_size: Count = 64
    """Images per rank."""
    num_workers: Count | Literal["auto"] = "auto"
    """CPU threads of DALI; auto shares out the cores."""
    prefetch: Count = 2
    """Batches made ahead."""
    use_multicrop: Flag = True
    """false: one global crop and no local ones, whatever multicrop counts."""
    multicrop: MultiCrop = MultiCrop()
    augmentation: Augmentation = Augmentation()

    @property
    def crop_counts(self) -> tuple[int, int]:
        """(global, local) crops of each image."""
        return (self.multicrop.num_global_crops, self.multicrop.num_local_crops) if self.use_multicrop else (1, 0)

    def per_global(self, values: float | tuple[float, ...]) -> tuple[float, ...]:
        """One value for each global crop."""
        count = self.crop_counts[0]
        return values[:count] if isinstance(values, tuple) else (values,) * count

    def rules(self) -> Iterator[tuple[str, str]]:
        for key in ("global_blur_prob", "solarize_prob"):
            given = len(self.per_global(getattr(self.augmentation, key)))
            if given < (count := self.crop_counts[0]):
                yield f"augmentation.{key}", f"has {given} values for {count} global crops; give {count}, or one number"


class Masking(Section):
    strategy: Literal["global_only", "global_with_local_context", "cross_crop_prediction"] = "global_only"
    num_masks: Count = 4
    """Target rectangles in each global crop."""
    mask_scale: ShareRange = (0.15, 0.2)
    """Area of a rectangle as a share of the crop."""
    aspect_ratio: PositiveRange = (0.75, 1.5)
    context_ratio: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.4
    """Share of a global crop's tokens that the encoder keeps."""
    query_ratio: SomeShare = 0.4
    """Share of a global crop's tokens that are predicted."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.context_ratio + self.query_ratio > 1 + 1e-9:
            total = f"{self.context_ratio} + {self.query_ratio}"
            yield "query_ratio", f"context_ratio + query_ratio = {total} is over 1, and no token is both; lower one"


class Level(Section):
    layer: Annotated[int, Field(strict=True)]
    """Encoder block whose output is the target; negative counts from the end."""
    stride: Count
    weight: Positive


class Model(Section):
    encoder: Place = "vit_base_patch16_dinov3"
    """A timm model name."""
    encoder_kwargs: dict[str, Scalar] = {}
    """Passed on to timm.create_model."""
    predictor_width: Count = 384
    predictor_depth: Count = 6
    predictor_heads: Count = 6
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    """null: three levels spread over the depth, strides 1, 2, 4 and weights 1.0, 0.5, 0.25."""
    projector_hidden: Count = 2048
    projector_dim: Count = 256

    @property
    def patch_size(self) -> int | None:
        """Pixels, where the settings tell it."""
        named = re.search(r"patch(\d+)", self.encoder)
        size = self.encoder_kwargs.get("patch_size", int(named[1]) if named else None)
        return size if isinstance(size, int) and size > 0 else None

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.predictor_width % self.predictor_heads:
            yield "predictor_heads", f"{self.predictor_heads} does not divide predictor_width {self.predictor_width}"


class Loss(Section):
    view_weight: AtLeastZero = 1.0
    sigreg_weight: AtLeastZero = 0.05
    sigreg_slices: Count = 256
    sigreg_knots: Annotated[int, Field(strict=True, ge=2)] = 17


class Training(Section):
    epochs: Count = 100
    lr: Positive = 5e-4
    """The peak, for the batch as given: it is not rescaled."""
    warmup_epochs: AtLeastZero = 10
    final_lr_ratio: Share = 0.0
    """The last learning rate as a share of the peak."""
    weight_decay: AtLeastZero = 0.05
    grad_clip: Positive | None = 1.0
    """Largest gradient norm; null: no clipping."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    use_amp: Flag = True
    """bf16 autocast on a GPU."""
    ema_momentum: Share = 0.996
    ema_final_momentum: Share = 1.0
    max_steps: Count | None = None
    """null: epochs decide."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.warmup_epochs > self.epochs:
            yield "warmup_epochs", f"{self.warmup_epochs:g} is more than epochs = {self.epochs}; lr would never peak"


class Checkpoint(Section):
    save_frequency: Count = 1000
    """In steps."""
    keep_last_n: Count = 3
    resume: Literal["auto", "none"] | Place = "auto"
    """auto: go on from the run folder's newest checkpoint; none: start over; or the path of a checkpoint."""


class Logging(Section):
    run_name: FolderName
    """The run's folder inside run_dir."""
    run_dir: Place = "runs"
    log_frequency: Count = 10
    """In steps."""
    tensorboard: Flag = True


class Evaluation(Section):
    eval_frequency: Whole = 0
    """In epochs; 0: at the start and the end alone."""
    knn_k: Count = 20
    batch_size: Count = 64
    crop_ratio: SomeShare = 0.875
    """Share of the shorter side that the centre crop keeps."""


class Config(Section):
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: the GPU when there is one, for DALI and torch alike."""
    seed: Whole = 0
    data: Data
    masking: Masking = Masking()
    model: Model = Model()
    loss: Loss = Loss()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging
    evaluation: Evaluation = Evaluation()

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, as plain lists and numbers."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Text that `load_config` reads back to an equal Config."""
        return to_text(self.resolved)

    def rules(self) -> Iterator[tuple[str, str]]:
        num_global, num_local = self.data.crop_counts
        if self.masking.strategy != "global_only" and num_global == 1 and num_local == 0:
            yield "masking.strategy", f"{self.masking.strategy} needs a second crop; set data.multicrop.num_local_crops"
        for kind, count in (("global", num_global), ("local", num_local)):
            size, patch = getattr(self.data.multicrop, f"{kind}_crop_size"), self.model.patch_size
            if count and patch and size % patch:
                near = f"{max(size // patch, 1) * patch} or {(size // patch + 1) * patch}"
                yield f"data.multicrop.{kind}_crop_size", f"{size} is no multiple of the patch size {patch}; try {near}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.config", description="The keys of a run's YAML file.")
    parser.add_argument("--schema", action="store_true", required=True, help="print their JSON Schema, for editors")
    parser.parse_args()
    print(json.dumps(Config.model_json_schema(), indent=2))


if __name__ == "__main__":
    main()
