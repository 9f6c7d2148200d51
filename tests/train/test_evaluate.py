import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from train.evaluate import colour_histogram, knn_accuracy, pixels
from train.metrics import mean_std, rankme


def test_knn_with_one_neighbour_equals_scikit_learn() -> None:
    torch.manual_seed(0)
    train, test = torch.randn(300, 8), torch.randn(100, 8)
    labels = torch.randint(0, 5, (300,))
    wanted = torch.randint(0, 5, (100,))
    reference = KNeighborsClassifier(1, metric="cosine").fit(train, labels).score(test, wanted)
    assert knn_accuracy(train, labels, test, wanted, k=1) == pytest.approx(100 * reference)


def test_knn_weighs_votes_by_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    # Two far neighbours of class 1 lose against one near neighbour of class 0.
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.1]]), torch.tensor([0]), k=20) == 100


def test_rankme_of_orthogonal_features_is_their_number_and_of_a_line_is_one() -> None:
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rankme(torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 16)) < 1.01


def test_feature_std_is_one_over_root_d_for_spread_features_and_zero_for_a_collapse() -> None:
    spread = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert mean_std(spread) == pytest.approx(1 / 8, rel=0.02)
    assert mean_std(torch.ones(100, 64)) == 0


def test_the_baselines_see_what_their_names_say() -> None:
    crops = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert pixels(crops).shape == (2, 3072)
    shuffled = crops.flatten(2)[..., torch.randperm(64 * 64)].view_as(crops)
    torch.testing.assert_close(colour_histogram(shuffled), colour_histogram(crops))
    np.testing.assert_allclose(colour_histogram(crops).square().sum(1), 64 * 64)
