"""Every setting of a run: its key, type, bounds and default.

`python -m train.config --schema` prints them as JSON Schema, `train/config/load.py` reads them from YAML, and
`train/config/rules.py` holds the rules between keys. Ratios are fractions in 0..1, sizes are pixels.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from model import defaults as model_defaults
from pipeline import defaults
from pipeline.files import expand_path
from train.config.yaml12 import to_text

# Strict, because pydantic would otherwise take "32" for 32, 1 for true and 2.0 for 2.
NonNegativeInt = Annotated[StrictInt, Field(ge=0)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]
NonNegativeFloat = Annotated[StrictFloat, Field(ge=0)]
PositiveFloat = Annotated[StrictFloat, Field(gt=0)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
FractionBelowOne = Annotated[StrictFloat, Field(ge=0, lt=1)]
PositiveFraction = Annotated[StrictFloat, Field(gt=0, le=1)]
# A stronger jitter would shift the hue (by a quarter of the strength) out of its range of -0.5..0.5.
JitterStrength = Annotated[StrictFloat, Field(ge=0, le=2)]
Device = Annotated[Literal["auto", "cpu", "gpu"], BeforeValidator(lambda value: "gpu" if value == "cuda" else value)]
PerGlobalCrop = Fraction | tuple[Fraction, ...]
Scalar = StrictBool | StrictInt | StrictFloat | str | None
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]  # without control characters
PathText = Annotated[Name, AfterValidator(expand_path)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")]


def _check_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"[{pair[0]}, {pair[1]}] is in the wrong order; write [low, high]")
    return pair


FractionRange = Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_check_order)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_check_order)]


class Section(BaseModel):
    """A frozen group of keys, which `configs/multicrop_training.yaml` explains one by one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MultiCrop(Section):
    num_global_crops: PositiveInt = defaults.NUM_GLOBAL_CROPS
    num_local_crops: NonNegativeInt = defaults.NUM_LOCAL_CROPS
    global_crop_size: PositiveInt = defaults.GLOBAL_CROP_SIZE
    local_crop_size: PositiveInt = defaults.LOCAL_CROP_SIZE
    global_crop_scale: FractionRange = defaults.GLOBAL_CROP_SCALE
    local_crop_scale: FractionRange = defaults.LOCAL_CROP_SCALE
    global_color_jitter: JitterStrength = defaults.COLOR_JITTER
    local_color_jitter: JitterStrength = defaults.COLOR_JITTER


class Augmentation(Section):
    flip_prob: Fraction = defaults.FLIP_PROB
    color_jitter_prob: Fraction = defaults.COLOR_JITTER_PROB
    gray_prob: Fraction = defaults.GRAY_PROB
    global_blur_prob: PerGlobalCrop = defaults.GLOBAL_BLUR_PROB
    local_blur_prob: Fraction = defaults.LOCAL_BLUR_PROB
    blur_sigma: PositiveRange = defaults.BLUR_SIGMA
    solarize_prob: PerGlobalCrop = defaults.SOLARIZE_PROB
    mean: tuple[Fraction, Fraction, Fraction] = defaults.IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = defaults.IMAGENET_STD


class Data(Section):
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "sample", "custom"] = "imagenet"
    data_path: PathText
    val_ratio: FractionBelowOne | None = None
    resize: PositiveInt | None = None
    cache_dir: PathText | None = None
    store_retry_s: NonNegativeFloat = defaults.STORE_RETRY_S
    batch_size: PositiveInt = defaults.BATCH_SIZE
    num_workers: PositiveInt | Literal["auto"] = "auto"
    prefetch: PositiveInt = defaults.PREFETCH
    crop_device: Literal["auto", "gpu", "dali", "cpu"] = "auto"
    pin_memory: StrictBool = True
    max_bad_share: FractionBelowOne = defaults.MAX_BAD_SHARE
    use_multicrop: StrictBool = True
    multicrop: MultiCrop = MultiCrop()
    augmentation: Augmentation = Augmentation()

    @property
    def crop_counts(self) -> tuple[int, int]:
        """The number of (global, local) crops per image."""
        return (self.multicrop.num_global_crops, self.multicrop.num_local_crops) if self.use_multicrop else (1, 0)


class Masking(Section):
    strategy: Literal["global_only", "global_with_local_context", "cross_crop_prediction", "none"] = "global_only"
    num_masks: PositiveInt = model_defaults.NUM_MASKS
    mask_scale: FractionRange = model_defaults.MASK_SCALE
    aspect_ratio: PositiveRange = model_defaults.ASPECT_RATIO
    context_ratio: Annotated[StrictFloat, Field(gt=0, lt=1)] = model_defaults.CONTEXT_RATIO
    query_ratio: PositiveFraction = model_defaults.QUERY_RATIO


class Level(Section):
    layer: StrictInt
    stride: PositiveInt
    weight: PositiveFloat


class Model(Section):
    encoder: Name = "vit_base_patch16_dinov3"
    encoder_kwargs: dict[str, Scalar] = Field(default_factory=dict)
    weights: PathText | None = None
    predictor_width: PositiveInt = 384
    predictor_depth: PositiveInt = 6
    predictor_heads: PositiveInt = 6
    levels: tuple[Level, ...] | None = None
    projector_hidden: PositiveInt = 2048
    projector_dim: PositiveInt = 256
    grad_checkpointing: StrictBool = model_defaults.GRAD_CHECKPOINTING

    @property
    def patch_size(self) -> int | None:
        """In pixels; None if the settings do not say."""
        named = re.search(r"patch(\d+)", self.encoder)
        size = self.encoder_kwargs.get("patch_size", int(named[1]) if named else None)
        return size if isinstance(size, int) and size > 0 else None


class Loss(Section):
    prediction_weight: NonNegativeFloat = model_defaults.PREDICTION_WEIGHT
    summary_weight: NonNegativeFloat = model_defaults.SUMMARY_WEIGHT
    view_weight: NonNegativeFloat = model_defaults.VIEW_WEIGHT
    sigreg_weight: NonNegativeFloat = model_defaults.SIGREG_WEIGHT
    anchor_weight: NonNegativeFloat = model_defaults.ANCHOR_WEIGHT
    colour_weight: NonNegativeFloat = model_defaults.COLOUR_WEIGHT
    sigreg_slices: PositiveInt = 256
    whiten_targets: StrictBool = False


class Training(Section):
    epochs: PositiveInt = 100
    lr: PositiveFloat = 5e-4
    optimizer: Literal["adamw", "muon"] = "adamw"
    accumulation_steps: PositiveInt = 1
    warmup_epochs: NonNegativeFloat = 10
    final_lr_ratio: Fraction = 0.0
    weight_decay: NonNegativeFloat = 0.05
    grad_clip: PositiveFloat | None = 1.0
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    use_amp: StrictBool = True
    compile: StrictBool | Literal["cudagraphs"] = False
    ema_momentum: Fraction = 0.996
    ema_final_momentum: Fraction = 1.0
    max_steps: PositiveInt | None = None
    min_steps: NonNegativeInt = 0
    train_blocks: Annotated[str, Field(pattern=r"^(all|last_[1-9]\d*)$")] = "all"
    layer_decay: PositiveFraction = 1.0
    heads_first_ratio: FractionBelowOne = 0.0
    timeout_s: PositiveFloat = 900.0
    max_skipped_steps: PositiveInt = 20


class Checkpoint(Section):
    save_frequency: PositiveInt = 1000
    keep_last_n: PositiveInt = 3
    keep_best_n: NonNegativeInt = 0
    resume: Literal["auto", "none"] | PathText = "auto"


class Logging(Section):
    run_name: FolderName
    run_dir: PathText = "runs"
    log_frequency: PositiveInt = 10
    tensorboard: StrictBool = True
    wandb: StrictBool = False
    pictures: StrictBool = True


class Evaluation(Section):
    eval_frequency: NonNegativeInt = 0
    knn_k: PositiveInt = 20
    batch_size: PositiveInt = 64
    max_samples: PositiveInt = 50_000
    linear_epochs: NonNegativeInt = 20
    crop_ratio: PositiveFraction = 0.875


class Config(Section):
    device: Device = "auto"
    seed: NonNegativeInt = 0
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

    def to_yaml(self, origins: Mapping[str, str] | None = None) -> str:
        """Return text that `load_config` reads back to an equal Config, with the origin of each key as a comment."""
        return to_text(self.resolved, origins or {})
