"""Other methods, trained by the product's step with the same crops, encoder, optimiser, schedule and moving average.

Shared settings are not tuned for them, and their own recipes for ImageNet are left out (temperature warm-up, a last layer that
is frozen at first, augmentations without jitter).
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from model.hjepa import join_crops, pool_views
from model.masks import MaskPlan
from model.teacher import StudentTeacher, move_average
from pipeline.dataset import CropBatch
from pipeline.shards.index import UNLABELLED, ShardIndex
from train.config.schema import Config

NUM_PROTOTYPES = 1024  # of DINO, whose 65,536 are for the thousand classes of ImageNet


def encode_views(encoder: MultiCropEncoder, crops: Sequence[torch.Tensor], num_global: int) -> torch.Tensor:
    """Return the mean token of every unmasked crop, `[B, V, D] float32`, in one pass."""
    groups = [join_crops(part) for part in (crops[:num_global], crops[num_global:]) if part]
    return pool_views([out.tokens for out in encoder([(part, None) for part in groups])], len(crops[0]))


class Dino(StudentTeacher):
    """DINO (arXiv 2104.14294): each view of the student matches the centred, sharpened teacher outputs of the other globals.

    Head and loss are lightly's; the moving average is the run's. Crops are those of `HJEPA.forward`.
    """

    def __init__(self, encoder: MultiCropEncoder, num_global: int, hidden: int, bottleneck: int) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules.heads import DINOProjectionHead

        super().__init__(encoder)
        self.num_global = num_global
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly still uses torch's older weight_norm
            heads = [DINOProjectionHead(encoder.width, hidden, bottleneck, NUM_PROTOTYPES) for _ in range(2)]
        self.head, self.target_head = heads
        self.target_head.load_state_dict(self.head.state_dict())
        self.target_head.requires_grad_(False)
        self.cross_entropy = DINOLoss(NUM_PROTOTYPES)

    def forward(self, crops: Sequence[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the `loss`; `labels` are ignored."""
        with torch.no_grad():
            taught = encode_views(self.target, crops[: self.num_global], self.num_global)
            targets = self.target_head(taught.flatten(0, 1)).unflatten(0, taught.shape[:2])
        views = encode_views(self.encoder, crops, self.num_global)
        outputs = self.head(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return {"loss": self.cross_entropy(list(targets.unbind(1)), list(outputs.unbind(1)))}

    def update_target(self, momentum: float, skip: torch.Tensor | None = None) -> None:
        super().update_target(momentum, skip)
        move_average(self.target_head, self.head, momentum, skip)


class Supervised(StudentTeacher):
    """Cross-entropy of a linear classifier of every view: an upper bound rather than a competitor."""

    def __init__(self, encoder: MultiCropEncoder, num_global: int, classes: int) -> None:
        super().__init__(encoder)
        self.num_global, self.head = num_global, nn.Linear(encoder.width, classes)

    def forward(self, crops: Sequence[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(encode_views(self.encoder, crops, self.num_global))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))}


def peer_losses(replica: nn.Module, batch: CropBatch, _: MaskPlan, __: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the losses of a model that takes crops and labels: a `LossFunction` of the trainer."""
    return replica(batch.crops, batch.labels)


def build_peer(variant: str, config: Config, encoder: MultiCropEncoder, index: ShardIndex) -> StudentTeacher | None:
    """Return the method of that name, or None for settings of ours. Raises ValueError for labels that are missing."""
    num_global = config.data.crop_counts[0]
    if variant == "dino":
        return Dino(encoder, num_global, config.model.projector_hidden, config.model.projector_dim)
    if variant != "supervised":
        return None
    labels = index.samples["label"]
    if (labels == UNLABELLED).any():
        raise ValueError(f"{index.folder}: has images without labels; leave supervised out of --variants")
    return Supervised(encoder, num_global, int(labels.max()) + 1)
