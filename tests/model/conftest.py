"""A small model and batches for it, shared by the tests of the complete step."""

from collections.abc import Callable

import pytest
import torch

from model import MultiCropMaskGenerator
from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA, default_levels
from model.losses import LossWeights, random_directions
from model.predictor import Predictor
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD

OPTIONS = {
    "num_global_crops": 2, "global_crop_size": 48, "projector_hidden": 32, "projector_dim": 16,
}  # fmt: skip
BATCH = 6


def build(with_predictor: bool = True, **changes: object) -> HJEPA:
    """Build a model for globals of 6x6 and locals of 2x2 tokens with three blocks and levels; `view_weight=2` sets a weight."""
    torch.manual_seed(0)
    encoder = MultiCropEncoder(
        "vit_small_patch16_dinov3",
        [48, 16],
        img_size=48,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        init_values=0.1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    predictor = Predictor(32, 32, 2, 2, 3) if with_predictor else None
    given = {name.removesuffix("_weight"): changes.pop(name) for name in list(changes) if name.endswith("_weight")}
    weights = LossWeights(**{"sigreg": 0.1, **given})
    return HJEPA(encoder, predictor, default_levels(3), weights=weights, **{**OPTIONS, **changes})


def draw_inputs(strategy: str = "global_only", num_global: int = 2, num_local: int = 4, seed: int = 1) -> dict:
    torch.manual_seed(seed)
    sizes = [48] * num_global + [16] * num_local
    corners = torch.rand(BATCH, len(sizes), 2, 2).sort(dim=2).values
    masks = MultiCropMaskGenerator(strategy, num_global, num_local, grid=6, local_grid=2)
    return {
        "crops": [torch.randn(BATCH, 3, size, size) for size in sizes],
        "boxes": torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.05], dim=-1).clamp(0, 1),
        "flips": torch.rand(BATCH, len(sizes)) < 0.5,
        "plan": masks(BATCH),
        "directions": random_directions(16, 8, torch.Generator().manual_seed(0), torch.device("cpu")),
    }


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: tensors this small are slower on several, above all next to other processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., HJEPA]:
    return build


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict]:
    return draw_inputs
