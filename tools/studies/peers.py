"""Methods that are not ours, trained by the product's step: the same crops, encoder, optimiser, schedule and moving average.

What they share with us is not tuned for them, and their own recipes for ImageNet (warm-up of temperatures, a last layer that
is frozen at first, augmentations without jitter) are left out.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from model.hjepa import join_crops, pool_views
from model.masks import MaskPlan
from model.teacher import TaughtEncoder, move_average
from pipeline.batch import CropBatch
from pipeline.shards.index import UNLABELLED, ShardIndex
from train.config.schema import Config

OUTPUTS = 1024  # prototypes of DINO; its 65,536 are for the thousand classes of ImageNet


def encode_views(encoder: MultiCropEncoder, crops: Sequence[torch.Tensor], num_global: int) -> torch.Tensor:
    """`[B, V, D] float32`: the mean token of every whole crop, in one pass."""
    groups = [join_crops(part) for part in (crops[:num_global], crops[num_global:]) if part]
    return pool_views([out.tokens for out in encoder([(part, None) for part in groups])], len(crops[0]))


class Dino(TaughtEncoder):
    """DINO (arXiv 2104.14294): all views of the student match the other globals' centred and sharpened teacher outputs.

    Head and loss are lightly's; the moving average is the run's. Crops as in `HJEPA.forward`.
    """

    def __init__(self, encoder: MultiCropEncoder, num_global: int, hidden: int, bottleneck: int) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules.heads import DINOProjectionHead

        super().__init__(encoder)
        self.num_global = num_global
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly still uses torch's older weight_norm
            heads = [DINOProjectionHead(encoder.width, hidden, bottleneck, OUTPUTS) for _ in range(2)]
        self.head, self.target_head = heads
        self.target_head.load_state_dict(self.head.state_dict())
        self.target_head.requires_grad_(False)
        self.cross_entropy = DINOLoss(OUTPUTS)

    def forward(self, crops: Sequence[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss`; `labels` are not looked at."""
        with torch.no_grad():
            seen = encode_views(self.target, crops[: self.num_global], self.num_global)
            taught = self.target_head(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        views = encode_views(self.encoder, crops, self.num_global)
        found = self.head(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return {"loss": self.cross_entropy(list(taught.unbind(1)), list(found.unbind(1)))}

    def update_target(self, momentum: float, skip: torch.Tensor | None = None) -> None:
        super().update_target(momentum, skip)
        move_average(self.target_head, self.head, momentum, skip)


class Supervised(TaughtEncoder):
    """Cross-entropy on the labels, of a linear classifier of every view: an upper bound, not a peer."""

    def __init__(self, encoder: MultiCropEncoder, num_global: int, classes: int) -> None:
        super().__init__(encoder)
        self.num_global, self.head = num_global, nn.Linear(encoder.width, classes)

    def forward(self, crops: Sequence[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(encode_views(self.encoder, crops, self.num_global))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))}


def peer_losses(
    replica: nn.Module, batch: CropBatch, _plan: MaskPlan, _directions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The `loss_fn` of a model that takes crops and labels."""
    return replica(batch.crops, batch.labels)


def build_peer(variant: str, config: Config, encoder: MultiCropEncoder, index: ShardIndex) -> TaughtEncoder | None:
    """The method of that name; None for variants that are settings of ours. ValueError when images have no labels to learn."""
    num_global = config.data.crop_counts[0]
    if variant == "dino":
        return Dino(encoder, num_global, config.model.projector_hidden, config.model.projector_dim)
    if variant != "supervised":
        return None
    labels = index.samples["label"]
    if (labels == UNLABELLED).any():
        raise ValueError(f"{index.folder}: has images without labels; leave supervised out of --variants")
    return Supervised(encoder, num_global, int(labels.max()) + 1)
