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
    """A frozen group of keys; the docstring below a key is its description in the JSON Schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class MultiCrop(Section):
    num_global_crops: PositiveInt = defaults.NUM_GLOBAL_CROPS
    num_local_crops: NonNegativeInt = defaults.NUM_LOCAL_CROPS
    global_crop_size: PositiveInt = defaults.GLOBAL_CROP_SIZE
    local_crop_size: PositiveInt = defaults.LOCAL_CROP_SIZE
    global_crop_scale: FractionRange = defaults.GLOBAL_CROP_SCALE
    """Area of a crop as a fraction of its source image."""
    local_crop_scale: FractionRange = defaults.LOCAL_CROP_SCALE
    global_color_jitter: JitterStrength = defaults.COLOR_JITTER
    """Strength s: brightness and contrast s, saturation s/2, hue s/4."""
    local_color_jitter: JitterStrength = defaults.COLOR_JITTER


class Augmentation(Section):
    flip_prob: Fraction = defaults.FLIP_PROB
    color_jitter_prob: Fraction = defaults.COLOR_JITTER_PROB
    gray_prob: Fraction = defaults.GRAY_PROB
    global_blur_prob: PerGlobalCrop = defaults.GLOBAL_BLUR_PROB
    """One number per global crop, or a single number for all."""
    local_blur_prob: Fraction = defaults.LOCAL_BLUR_PROB
    blur_sigma: PositiveRange = defaults.BLUR_SIGMA
    solarize_prob: PerGlobalCrop = defaults.SOLARIZE_PROB
    """One number per global crop, or a single number for all."""
    mean: tuple[Fraction, Fraction, Fraction] = defaults.IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = defaults.IMAGENET_STD


class Data(Section):
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "sample", "custom"] = "imagenet"
    data_path: PathText
    """Folder that holds the shards in train/ and val/; or pictures in any layout that make_shards.py convert reads; or a prefix
    of an object store (s3://, gs://, az://, hf://, https://). Pictures are converted and stores copied once, to cache_dir."""
    val_ratio: FractionBelowOne | None = None
    """Share of the pictures of every class that becomes val/ when data_path holds pictures; null: 0.1."""
    resize: PositiveInt | None = None
    """Pixels to which the shorter side of larger pictures is reduced when data_path holds pictures; null: none are."""
    cache_dir: PathText | None = None
    """Folder on a local disk for shards that are converted or copied from data_path. null: shards/converted."""
    store_retry_s: NonNegativeFloat = defaults.STORE_RETRY_S
    """Seconds during which a store that fails, or shards that are away, are tried again; then the run saves and stops."""
    batch_size: PositiveInt = defaults.BATCH_SIZE
    """Images per rank."""
    num_workers: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of DALI; auto: half of this rank's cores."""
    prefetch: PositiveInt = defaults.PREFETCH
    """Batches that are prefetched."""
    crop_device: Literal["auto", "gpu", "cpu"] = "auto"
    """Where a GPU run makes its crops. gpu: decoded there, by one kernel; cpu: decoded and made on the CPU, then uploaded; auto:
    gpu if that works."""
    pin_memory: StrictBool = True
    """Accepted because the user's guide has it, but without effect: DALI always uploads through pinned memory."""
    max_bad_share: FractionBelowOne = defaults.MAX_BAD_SHARE
    """Fraction of samples that can fail to decode and be replaced by others before the run stops."""
    use_multicrop: StrictBool = True
    """false: one global crop and no local crops, whatever `multicrop` says."""
    multicrop: MultiCrop = MultiCrop()
    augmentation: Augmentation = Augmentation()

    @property
    def crop_counts(self) -> tuple[int, int]:
        """The number of (global, local) crops per image."""
        return (self.multicrop.num_global_crops, self.multicrop.num_local_crops) if self.use_multicrop else (1, 0)


class Masking(Section):
    strategy: Literal["global_only", "global_with_local_context", "cross_crop_prediction", "none"] = "global_only"
    """none: the encoder sees complete global crops; for training without prediction."""
    num_masks: PositiveInt = model_defaults.NUM_MASKS
    """Target rectangles in each global crop."""
    mask_scale: FractionRange = model_defaults.MASK_SCALE
    """Area of a rectangle as a fraction of the crop."""
    aspect_ratio: PositiveRange = model_defaults.ASPECT_RATIO
    context_ratio: Annotated[StrictFloat, Field(gt=0, lt=1)] = model_defaults.CONTEXT_RATIO
    """Fraction of a global crop's tokens that the encoder sees."""
    query_ratio: PositiveFraction = model_defaults.QUERY_RATIO
    """Fraction of a global crop's tokens that are predicted."""


class Level(Section):
    layer: StrictInt
    """Encoder block whose output is the target; negative numbers count from the end."""
    stride: PositiveInt
    weight: PositiveFloat


class Model(Section):
    encoder: Name = "vit_base_patch16_dinov3"
    """A timm model name."""
    encoder_kwargs: dict[str, Scalar] = Field(default_factory=dict)
    """Arguments for timm.create_model."""
    weights: PathText | None = None
    """Weights to start from: a timm tag, hf-hub:OWNER/NAME, an exported folder, a safetensors file, a run or a checkpoint."""
    predictor_width: PositiveInt = 384
    predictor_depth: PositiveInt = 6
    predictor_heads: PositiveInt = 6
    levels: tuple[Level, ...] | None = None
    """null: three levels spread over the depth, with strides 1, 2, 4 and weights 1.0, 0.5, 0.25."""
    projector_hidden: PositiveInt = 2048
    projector_dim: PositiveInt = 256
    grad_checkpointing: StrictBool = model_defaults.GRAD_CHECKPOINTING
    """Keep one activation per block of encoder and predictor and recompute the others: less memory, more time."""

    @property
    def patch_size(self) -> int | None:
        """In pixels; None if the settings do not say."""
        named = re.search(r"patch(\d+)", self.encoder)
        size = self.encoder_kwargs.get("patch_size", int(named[1]) if named else None)
        return size if isinstance(size, int) and size > 0 else None


class Loss(Section):
    prediction_weight: NonNegativeFloat = model_defaults.PREDICTION_WEIGHT
    """Weight of the prediction loss, summed over the levels; 0: no predictor is built."""
    summary_weight: NonNegativeFloat = model_defaults.SUMMARY_WEIGHT
    """Weight of predicting the target's maps from the mean of the encoded tokens; 0: nothing is built for it."""
    view_weight: NonNegativeFloat = model_defaults.VIEW_WEIGHT
    sigreg_weight: NonNegativeFloat = model_defaults.SIGREG_WEIGHT
    anchor_weight: NonNegativeFloat = model_defaults.ANCHOR_WEIGHT
    """Weight of 1 - cosine between the tokens of the student and of model.weights, patches and their mean; 0: not computed."""
    sigreg_slices: PositiveInt = 256


class Training(Section):
    epochs: PositiveInt = 100
    lr: PositiveFloat = 5e-4
    """Peak learning rate; it is not rescaled with the batch size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the weights of the blocks' linear layers; AdamW updates all others, with the same learning rate."""
    accumulation_steps: PositiveInt = 1
    """Batches per rank and step. Standardisation in the view term and SIGReg compare the images of one batch of all ranks."""
    warmup_epochs: NonNegativeFloat = 10
    final_lr_ratio: Fraction = 0.0
    """Final learning rate as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.05
    grad_clip: PositiveFloat | None = 1.0
    """Maximum gradient norm; null: no clipping."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    use_amp: StrictBool = True
    """bf16 autocast on a GPU."""
    compile: StrictBool = False
    """torch.compile the model's passes; takes minutes at the start."""
    ema_momentum: Fraction = 0.996
    ema_final_momentum: Fraction = 1.0
    max_steps: PositiveInt | None = None
    """null: `epochs` decides."""
    min_steps: NonNegativeInt = 0
    """Steps that few images are shown for in more than `epochs`; max_steps counts before it."""
    train_blocks: Annotated[str, Field(pattern=r"^(all|last_[1-9]\d*)$")] = "all"
    """last_N: of the encoder, only the last N blocks and the final norm learn; the others keep no gradients."""
    layer_decay: PositiveFraction = 1.0
    """Factor between the learning rates of two neighbouring blocks of the encoder, the earlier having the lower one."""
    heads_first_ratio: FractionBelowOne = 0.0
    """Fraction of the steps at the start in which predictor and projector learn and the encoder does not."""
    timeout_s: PositiveFloat = 900.0
    """With several ranks: seconds without a step after which the run stops and shows where each rank is."""
    max_skipped_steps: PositiveInt = 20
    """Consecutive steps without a finite loss and gradient after which the run stops."""


class Checkpoint(Section):
    save_frequency: PositiveInt = 1000
    """In steps."""
    keep_last_n: PositiveInt = 3
    keep_best_n: NonNegativeInt = 0
    """Additional checkpoints to keep: those with the best k-NN accuracy or, with eval_frequency 0, the lowest loss."""
    resume: Literal["auto", "none"] | PathText = "auto"
    """auto: continue from the run folder's newest checkpoint; none: start over; or the path of a checkpoint."""


class Logging(Section):
    run_name: FolderName
    """The run's folder inside run_dir."""
    run_dir: PathText = "runs"
    log_frequency: PositiveInt = 10
    """In steps."""
    tensorboard: StrictBool = True
    pictures: StrictBool = True
    """Draw crops, masks, features, neighbours and curves at every evaluation and at the end; false: none of them."""


class Evaluation(Section):
    eval_frequency: NonNegativeInt = 0
    """In epochs; 0: only at the start and the end."""
    knn_k: PositiveInt = 20
    batch_size: PositiveInt = 64
    max_samples: PositiveInt = 50_000
    """Maximum number of images from each split, evenly spaced."""
    linear_epochs: NonNegativeInt = 20
    """Epochs of the linear probe; 0: k-NN only."""
    crop_ratio: PositiveFraction = 0.875
    """Side of the centre crop as a fraction of the image's shorter side."""


class Config(Section):
    device: Device = "auto"
    """For DALI and torch; auto: the GPU if there is one."""
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
