"""Guessing the target's maps of a whole global crop from the mean of what the student saw of it."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from model.losses import weighted_sum

HIDDEN_RATIO = 4  # of the encoder's width, as in a block's MLP


class SummaryPredictor(nn.Module):
    """For each level, one hidden layer over the summary and a learned vector of the cell's place in the grid.

    The predictor over tokens asks what a masked cell looks like given its surroundings. This one asks it of the pooled feature,
    the one that is used after training, which so has to hold the layout of the image at all levels.
    """

    def __init__(self, width: int, cells: Sequence[int]) -> None:
        """`width` of the encoder; `cells`: the number of cells of each level."""
        super().__init__()
        hidden = HIDDEN_RATIO * width
        self.enter = nn.ModuleList(nn.Linear(width, hidden) for _ in cells)
        self.places = nn.ParameterList(nn.Parameter(0.5 * torch.randn(count, hidden)) for count in cells)
        self.heads = nn.ModuleList(nn.Linear(hidden, width) for _ in cells)

    def forward(self, summaries: torch.Tensor) -> list[torch.Tensor]:
        """Summaries `[n, D]` -> per level `[n, cells, D]`."""
        parts = zip(self.enter, self.places, self.heads, strict=True)
        return [head(F.gelu(enter(summaries)[:, None] + place)) for enter, place, head in parts]


def summary_loss(guesses: list[torch.Tensor], targets: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`[] float32`: smooth L1 distance over all cells, the weighted sum over the levels."""
    errors = [F.smooth_l1_loss(guess.float(), target) for guess, target in zip(guesses, targets, strict=True)]
    return weighted_sum(weights, errors)
