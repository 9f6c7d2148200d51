"""The collapse signals of the log, on runs of the real step that do and do not collapse."""

from collections.abc import Callable

import torch

from model import MultiCropMaskGenerator
from model.hjepa import HJEPA
from model.losses import random_directions
from train.metrics import mean_std, rankme


def train(model: HJEPA, momentum: float) -> tuple[list[float], list[float]]:
    """RankMe, and the mean standard deviation, of the target's pooled features at the first and at the last of 125 steps."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    masks = MultiCropMaskGenerator("global_only", 2, 2, grid=6, local_grid=2)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(32, 4, 4)
    seen = []
    for _ in range(125):
        image = torch.nn.functional.interpolate(torch.randn(32, 3, 3, 3), size=48, mode="bilinear")
        crops = [image + 0.1 * torch.randn_like(image) for _ in range(2)]
        crops += [torch.nn.functional.avg_pool2d(image, 3) for _ in range(2)]
        directions = random_directions(16, 16, torch.default_generator, torch.device("cpu"))
        losses = model(crops, boxes, torch.zeros(32, 4, dtype=torch.bool), masks(32), directions)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(momentum)
        seen.append(losses["features"])
    ends = (seen[0], seen[-1])
    return [rankme(features) for features in ends], [mean_std(features) for features in ends]


def test_without_its_guards_the_step_collapses_and_both_signals_tell(make_model: Callable[..., HJEPA]) -> None:
    """No view term, no SIGReg, and a target that is the student itself: both signals fall below half of their start."""
    for signal in train(make_model(view_weight=0.0, sigreg_weight=0.0), momentum=0.0):
        assert signal[1] < 0.5 * signal[0]
    for signal in train(make_model(sigreg_weight=3.0), momentum=0.9):
        assert signal[1] > 0.5 * signal[0]
