"""Every setting of a run: its key, type and default, and the rules between keys.

`python -m train.config --schema` prints them. Ratios are shares in 0..1, sizes are pixels.
`train/config/load.py` reads them from YAML.
"""

from collections.abc import Iterator
from typing import Any, Literal

from train.config.data import Data
from train.config.model import Loss, Masking, Model
from train.config.types import (
    AtLeastZero,
    Beta,
    BrokenRule,
    Count,
    Flag,
    FolderName,
    Name,
    Place,
    Positive,
    RuledSection,
    Section,
    Share,
    SomeShare,
    Whole,
)
from train.config.yaml12 import to_text


class Training(Section):
    epochs: Count = 100
    lr: Positive = 5e-4
    """The peak, for the batch as given: it is not rescaled."""
    accumulation_steps: Count = 1
    """Batches of each rank in one step. Prediction losses are as with so many times the ranks; the view term's standardisation
    and SIGReg, which compare images with one another, see one batch of all ranks at a time."""
    warmup_epochs: AtLeastZero = 10
    final_lr_ratio: Share = 0.0
    """The last learning rate as a share of the peak."""
    weight_decay: AtLeastZero = 0.05
    grad_clip: Positive | None = 1.0
    """Largest gradient norm; null: no clipping."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    use_amp: Flag = True
    """bf16 autocast on a GPU."""
    compile: Flag = False
    """torch.compile the model's step: it takes minutes at the start."""
    ema_momentum: Share = 0.996
    ema_final_momentum: Share = 1.0
    max_steps: Count | None = None
    """null: epochs decide."""
    timeout_s: Positive = 900.0
    """On several ranks: after so long without a step, the run ends and shows where each rank stands."""
    max_skipped_steps: Count = 20
    """Steps in a row with a loss or gradient that is no finite number, until the run goes back to its last checkpoint; if they
    come again, it stops. Each such step is left out."""

    def rules(self) -> Iterator[BrokenRule]:
        if self.warmup_epochs > self.epochs:
            keys = ("warmup_epochs", "epochs")
            yield keys, f"{self.warmup_epochs:g} is more than epochs = {self.epochs}; lr would never peak"


class Checkpoint(Section):
    save_frequency: Count = 1000
    """In steps."""
    keep_last_n: Count = 3
    keep_best_n: Whole = 0
    """More that are kept: those of the best k-NN measured during the run or, with eval_frequency 0, of the lowest loss."""
    resume: Literal["auto", "none"] | Place = "auto"
    """auto: go on from the run folder's newest checkpoint; none: start over; or the path of a checkpoint."""


class Wandb(Section):
    enabled: Flag = False
    """Also log to Weights & Biases, if `wandb` is installed."""
    project: Name = "hjepa"


class Logging(Section):
    run_name: FolderName
    """The run's folder inside run_dir."""
    run_dir: Place = "runs"
    log_frequency: Count = 10
    """In steps."""
    tensorboard: Flag = True
    wandb: Wandb = Wandb()


class Evaluation(Section):
    eval_frequency: Whole = 0
    """In epochs; 0: at the start and the end alone."""
    knn_k: Count = 20
    batch_size: Count = 64
    max_samples: Count = 50_000
    """Images of each split that are used, evenly spread over it."""
    linear_epochs: Whole = 20
    """Passes of the linear probe over the features, at each measurement; 0: k-NN alone."""
    crop_ratio: SomeShare = 0.875
    """Share of the shorter side that the centre crop keeps."""


class Config(RuledSection):
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

    def rules(self) -> Iterator[BrokenRule]:
        counts = self.data.crop_counts
        count_keys = tuple(
            f"data.{key}" for key in ("multicrop.num_local_crops", "multicrop.num_global_crops", "use_multicrop")
        )
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
                yield keys, f"{size} is no multiple of the patch size {patch}; try {near}"
