import math

import numpy as np
import pytest
import torch
from torch import nn

from model.losses import BatchStandardize, SIGReg, Whiten, random_directions, view_loss


def test_sigreg_equals_a_plain_loop_over_views_directions_and_knots() -> None:
    torch.manual_seed(0)
    projections, directions = (
        torch.randn(20, 3, 8),
        random_directions(8, 5, torch.Generator().manual_seed(1), torch.device("cpu")),
    )
    knots = np.linspace(0, 3, 17)
    statistics = []
    for view in range(3):
        for direction in range(5):
            samples = (projections[:, view] @ directions[:, direction]).double().numpy()
            error = [(np.cos(t * samples).mean() - math.exp(-t * t / 2)) ** 2 + np.sin(t * samples).mean() ** 2 for t in knots]
            statistics.append(20 * 2 * np.trapezoid(np.array(error) * np.exp(-(knots**2) / 2), knots))
    torch.testing.assert_close(float(SIGReg(17)(projections, directions)), float(np.mean(statistics)), rtol=1e-4, atol=0)


def test_sigreg_is_small_for_a_gaussian_and_large_for_collapse_and_other_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = random_directions(16, 64, generator, torch.device("cpu"))
    gaussian = torch.randn(512, 1, 16, generator=generator)
    sigreg = SIGReg(17)
    normal = float(sigreg(gaussian, directions))
    for other in (torch.zeros_like(gaussian), 3 * gaussian, gaussian[..., :1].expand_as(gaussian), gaussian + 1):
        assert float(sigreg(other, directions)) > 10 * normal


def test_directions_have_unit_length() -> None:
    directions = random_directions(32, 100, torch.Generator().manual_seed(0), torch.device("cpu"))
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(100))


def test_the_view_term_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    projections = torch.randn(4, 5, 6)
    expected = np.mean(
        [float((projections[b, v] - projections[b, :2].mean(0)).square().mean()) for b in range(4) for v in range(5)]
    )
    torch.testing.assert_close(float(view_loss(projections, 2)), float(expected), rtol=1e-5, atol=0)


def test_batch_standardize_equals_batch_norm_in_training_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 10) * 3 + 2
    torch.testing.assert_close(BatchStandardize(10)(x), nn.BatchNorm1d(10).train()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [3, 64, 1024])
def test_whitening_equals_the_inverse_square_root_by_eigenvalues(width: int) -> None:
    torch.manual_seed(0)
    spread = torch.logspace(0, -6, width)  # from one large direction to many without variance
    tokens = (torch.randn(300, 8, width) * spread) @ torch.linalg.qr(torch.randn(width, width)).Q + 5
    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    roots = (values + 0.01 * values.mean()).rsqrt()
    expected = flat @ vectors @ torch.diag(roots) @ vectors.T
    torch.testing.assert_close(Whiten()(tokens).flatten(0, 1).double(), expected, atol=5e-3, rtol=1e-3)
