"""Every setting of a run: its key, type and default, and the rules between keys.

`python -m train.config --schema` prints them. Ratios are fractions in 0..1, sizes are pixels.
`train/config/load.py` reads them from YAML.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt

from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD, NUM_GLOBAL_CROPS, NUM_LOCAL_CROPS
from train.config.types import (
    BrokenRule,
    FolderName,
    Fraction,
    FractionBelowOne,
    FractionRange,
    JitterStrength,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PathText,
    PerGlobalCrop,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    PositiveRange,
    Scalar,
    Section,
)
from train.config.yaml12 import to_text


class MultiCrop(Section):
    num_global_crops: PositiveInt = NUM_GLOBAL_CROPS
    num_local_crops: NonNegativeInt = NUM_LOCAL_CROPS
    global_crop_size: PositiveInt = 224
    local_crop_size: PositiveInt = 96
    global_crop_scale: FractionRange = (0.4, 1.0)
    """Area of a crop as a fraction of its source image."""
    local_crop_scale: FractionRange = (0.05, 0.4)
    global_color_jitter: JitterStrength = 0.4
    """Strength s: brightness and contrast s, saturation s/2, hue s/4."""
    local_color_jitter: JitterStrength = 0.4


class Augmentation(Section):
    flip_prob: Fraction = 0.5
    color_jitter_prob: Fraction = 0.8
    gray_prob: Fraction = 0.2
    global_blur_prob: PerGlobalCrop = (1.0, 0.1)
    """One for each global crop, or a single number for all."""
    local_blur_prob: Fraction = 0.5
    blur_sigma: PositiveRange = (0.1, 2.0)
    solarize_prob: PerGlobalCrop = (0.0, 0.2)
    """One for each global crop, or a single number for all."""
    mean: tuple[Fraction, Fraction, Fraction] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD


class Data(Section):
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "sample", "custom"] = "imagenet"
    data_path: PathText
    """Folder, or prefix of a store (s3://, gs://, az://, hf://, https://), that holds train/ and val/ with their shards."""
    cache_dir: PathText | None = None
    """Shards of a store are copied into this folder, which should be on a local disk; null: a folder of the user's in $TMPDIR."""
    cache_size_gb: PositiveFloat = 100.0
    """Most that this folder holds; the shards least recently planned are removed first."""
    store_streams: PositiveInt = 2
    """Downloads at once of each rank. More help where one connection is slower than the line."""
    store_retry_s: NonNegativeFloat = 120.0
    """How long a failing store is asked again before the run saves a checkpoint and stops."""
    batch_size: PositiveInt = 64
    """Images per rank."""
    num_workers: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of DALI; auto: half of the cores of this rank."""
    hw_decoder_load: Fraction | Literal["auto"] = "auto"
    """Fraction of the JPEGs that the GPU's JPEG engine decodes, where it has one; auto: 0.65, DALI's own default."""
    prefetch: PositiveInt = 2
    """Batches made ahead."""
    crop_device: Literal["auto", "gpu", "cpu"] = "auto"
    """Where a GPU run makes its crops. cpu: the compiled CPU operator, then an upload; auto: the GPU if its decoder works."""
    pin_memory: StrictBool = True
    """Accepted, but has no effect: DALI always uploads through pinned memory."""
    use_mmap: StrictBool | Literal["auto"] = "auto"
    """Read shards through memory mappings; auto: on local disks, not on network file systems."""
    max_bad_share: FractionBelowOne = 0.01
    """Fraction of samples that may fail to decode, which others then replace; beyond it the run stops."""
    use_multicrop: StrictBool = True
    """false: one global crop and no local crops, whatever `multicrop` says."""
    multicrop: MultiCrop = MultiCrop()
    augmentation: Augmentation = Augmentation()

    @property
    def crop_counts(self) -> tuple[int, int]:
        """(global, local) crops of each image."""
        return (self.multicrop.num_global_crops, self.multicrop.num_local_crops) if self.use_multicrop else (1, 0)

    def rules(self) -> Iterator[BrokenRule]:
        count = self.crop_counts[0]
        for key in ("global_blur_prob", "solarize_prob"):
            values = getattr(self.augmentation, key)
            if isinstance(values, tuple) and len(values) < count:
                keys = (f"augmentation.{key}", "multicrop.num_global_crops", "use_multicrop")
                yield keys, f"has {len(values)} values for {count} global crops; give {count}, or one number for all"


class Masking(Section):
    strategy: Literal["global_only", "global_with_local_context", "cross_crop_prediction", "none"] = "global_only"
    """none: the encoder sees whole globals; for training without prediction."""
    num_masks: PositiveInt = 4
    """Target rectangles in each global crop."""
    mask_scale: FractionRange = (0.15, 0.2)
    """Area of a rectangle as a fraction of the crop."""
    aspect_ratio: PositiveRange = (0.75, 1.5)
    context_ratio: OpenFraction = 0.4
    """Fraction of a global crop's tokens that the encoder sees."""
    query_ratio: PositiveFraction = 0.4
    """Fraction of a global crop's tokens that are predicted."""
    exclude_covered: StrictBool = False
    """Leave cells that a local crop or the context crop covers out of the loss; not for global_only and none."""

    def rules(self) -> Iterator[BrokenRule]:
        if self.context_ratio + self.query_ratio > 1 + 1e-9:
            total = f"{self.context_ratio} + {self.query_ratio}"
            keys = ("query_ratio", "context_ratio")
            yield keys, f"context_ratio + query_ratio = {total} exceeds 1; a token cannot be both, lower one"
        if self.exclude_covered and self.strategy in ("global_only", "none"):
            keys = ("exclude_covered", "strategy")
            yield keys, f"true has no effect with {self.strategy}; write false"


class Level(Section):
    layer: StrictInt
    """Encoder block whose output is the target; negative counts from the end."""
    stride: PositiveInt
    weight: PositiveFloat


class Model(Section):
    encoder: Name = "vit_base_patch16_dinov3"
    """A timm model name."""
    encoder_kwargs: dict[str, Scalar] = Field(default_factory=dict)
    """Passed on to timm.create_model."""
    predictor_width: PositiveInt = 384
    predictor_depth: PositiveInt = 6
    predictor_heads: PositiveInt = 6
    levels: tuple[Level, ...] | None = None
    """null: three levels spread over the depth, strides 1, 2, 4 and weights 1.0, 0.5, 0.25."""
    projector_hidden: PositiveInt = 2048
    projector_dim: PositiveInt = 256
    grad_checkpointing: StrictBool = False
    """Store one activation per block of encoder and predictor and recompute the others: less memory, more time."""

    @property
    def patch_size(self) -> int | None:
        """In pixels, None if the settings do not say."""
        named = re.search(r"patch(\d+)", self.encoder)
        size = self.encoder_kwargs.get("patch_size", int(named[1]) if named else None)
        return size if isinstance(size, int) and size > 0 else None

    def rules(self) -> Iterator[BrokenRule]:
        if self.predictor_width % self.predictor_heads:
            keys = ("predictor_heads", "predictor_width")
            yield keys, f"{self.predictor_heads} does not divide predictor_width = {self.predictor_width}"
        for name in sorted({"mean", "std"} & self.encoder_kwargs.keys()):
            yield ("encoder_kwargs",), f"{name} is not an argument of timm's; set data.augmentation.{name}"
        if self.levels == ():
            yield ("levels",), "the list is empty; list some levels, or write null for the three default ones"


class Loss(Section):
    prediction_weight: NonNegativeFloat = 1.0
    """Of the sum over the levels; 0: no predictor is built."""
    summary_weight: NonNegativeFloat = 0.0
    """Of guessing the target's maps from the mean of the encoded tokens; 0: nothing is built for it."""
    view_weight: NonNegativeFloat = 1.0
    sigreg_weight: NonNegativeFloat = 0.05
    sigreg_slices: PositiveInt = 256
    sigreg_knots: Annotated[StrictInt, Field(ge=2)] = 17

    def rules(self) -> Iterator[BrokenRule]:
        keys = ("prediction_weight", "summary_weight", "view_weight", "sigreg_weight")
        if all(getattr(self, key) == 0 for key in keys):
            yield keys, "all four weights are 0, so nothing would be learned; raise one"


class Training(Section):
    epochs: PositiveInt = 100
    lr: PositiveFloat = 5e-4
    """Peak learning rate; it is not rescaled with the batch size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the weights of the blocks' linear layers; all others have AdamW, with the same learning rate."""
    accumulation_steps: PositiveInt = 1
    """Batches of each rank per step. The view term's standardisation and SIGReg compare the images of one batch of all ranks."""
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
    """torch.compile the model's step; takes minutes at the start."""
    ema_momentum: Fraction = 0.996
    ema_final_momentum: Fraction = 1.0
    max_steps: PositiveInt | None = None
    """null: `epochs` decides."""
    timeout_s: PositiveFloat = 900.0
    """With several ranks: after this time without a step, the run stops and shows where each rank is."""
    max_skipped_steps: PositiveInt = 20
    """Consecutive steps without a finite loss and gradient before the run returns to its last checkpoint; after that it stops."""

    def rules(self) -> Iterator[BrokenRule]:
        if self.warmup_epochs > self.epochs:
            keys = ("warmup_epochs", "epochs")
            yield keys, f"{self.warmup_epochs:g} is more than epochs = {self.epochs}; lr would never reach its peak"


class Checkpoint(Section):
    save_frequency: PositiveInt = 1000
    """In steps."""
    keep_last_n: PositiveInt = 3
    keep_best_n: NonNegativeInt = 0
    """Kept in addition: those with the best k-NN accuracy or, with eval_frequency 0, the lowest loss."""
    resume: Literal["auto", "none"] | PathText = "auto"
    """auto: continue from the run folder's newest checkpoint; none: start over; or the path of a checkpoint."""


class Wandb(Section):
    enabled: StrictBool = False
    """Also log to Weights & Biases, if `wandb` is installed."""
    project: Name = "hjepa"


class Logging(Section):
    run_name: FolderName
    """The run's folder inside run_dir."""
    run_dir: PathText = "runs"
    log_frequency: PositiveInt = 10
    """In steps."""
    tensorboard: StrictBool = True
    pictures: StrictBool = True
    """Draw crops, masks, features, neighbours and curves when features are measured and at the end."""
    wandb: Wandb = Wandb()


class Evaluation(Section):
    eval_frequency: NonNegativeInt = 0
    """In epochs; 0: only at the start and the end."""
    knn_k: PositiveInt = 20
    batch_size: PositiveInt = 64
    max_samples: PositiveInt = 50_000
    """Images used of each split, evenly spaced."""
    linear_epochs: NonNegativeInt = 20
    """Epochs of the linear probe; 0: k-NN only."""
    crop_ratio: PositiveFraction = 0.875
    """Side of the centre crop as a fraction of the shorter side."""


class Config(Section):
    device: Literal["auto", "cpu", "gpu"] = "auto"
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

    def to_yaml(self) -> str:
        """Text that `load_config` reads back to an equal Config."""
        return to_text(self.resolved)

    def rules(self) -> Iterator[BrokenRule]:
        if (self.device, self.data.crop_device) == ("cpu", "gpu"):
            device_keys = ("data.crop_device", "device")
            yield device_keys, "gpu needs device: gpu; a run on the CPU makes its crops there, write auto or cpu"
        counts = self.data.crop_counts
        count_keys = tuple(
            f"data.{key}" for key in ("multicrop.num_local_crops", "multicrop.num_global_crops", "use_multicrop")
        )
        yield from self._prediction_rules()
        strategy, patch = self.masking.strategy, self.model.patch_size
        partners = {"global_with_local_context": counts[1], "cross_crop_prediction": sum(counts) - 1}
        if not partners.get(strategy, 1):
            keys = ("masking.strategy", *count_keys)
            needed = "a local crop" if strategy == "global_with_local_context" else "a second crop"
            yield keys, f"{strategy} needs {needed}; raise data.multicrop.num_local_crops, or choose global_only"
        for kind, count in zip(("global", "local"), counts, strict=True):
            size: int = getattr(self.data.multicrop, f"{kind}_crop_size")
            if count and patch and size % patch:
                near = f"{size // patch * patch} or {(size // patch + 1) * patch}" if size > patch else patch
                keys = (f"data.multicrop.{kind}_crop_size", "model.encoder", "model.encoder_kwargs", *count_keys)
                yield keys, f"{size} is not a multiple of the patch size {patch}; try {near}"

    def _prediction_rules(self) -> Iterator[BrokenRule]:
        strategy, weight = self.masking.strategy, self.loss.prediction_weight
        if strategy == "none" and weight > 0:
            yield (
                ("masking.strategy", "loss.prediction_weight"),
                "none leaves nothing to predict; write loss.prediction_weight: 0, or choose global_only",
            )
        if strategy not in ("none", "global_only") and weight == 0:
            yield (
                ("loss.prediction_weight", "masking.strategy"),
                f"0 builds no predictor, and {strategy} differs only in what it sees; choose strategy global_only or none",
            )
