import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from train.evaluation import measure
from train.evaluation.features import Features
from train.evaluation.measure import knn_accuracies, leave_one_out_hits, nearest_neighbours

CPU = torch.device("cpu")


def test_knn_with_one_neighbour_equals_scikit_learn() -> None:
    torch.manual_seed(0)
    train, test = torch.randn(300, 8), torch.randn(100, 8)
    labels = torch.randint(0, 5, (300,))
    truth = torch.randint(0, 5, (100,))
    reference = KNeighborsClassifier(1, metric="cosine").fit(train, labels).score(test, truth)
    assert knn_accuracies(train, labels, test, truth, [1], CPU) == {1: pytest.approx(100 * reference)}


def test_knn_weighs_votes_by_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    # Two far neighbours of class 1 lose against one near neighbour of class 0.
    assert knn_accuracies(train, labels, torch.tensor([[1.0, 0.1]]), torch.tensor([0]), [20], CPU) == {20: 100.0}


def test_every_k_of_a_list_equals_a_weighted_vote_counted_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    train, test = torch.randn(120, 6, generator=generator), torch.randn(40, 6, generator=generator)
    labels, truth = (torch.randint(0, 4, (n,), generator=generator) for n in (120, 40))
    scores = knn_accuracies(train, labels, test, truth, [3, 10, 500], CPU)
    for k in (3, 10, 500):
        right = 0
        for row, label in zip(test, truth, strict=True):
            similar = torch.nn.functional.cosine_similarity(row[None], train)
            nearest = similar.argsort(descending=True)[:k]
            votes = [sum(float(torch.exp(similar[n] / 0.07)) for n in nearest if labels[n] == c) for c in range(4)]
            right += votes.index(max(votes)) == label
        assert scores[k] == pytest.approx(100 * right / 40), k


def test_neighbours_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    train, test = torch.randn(90, 5, generator=generator), torch.randn(31, 5, generator=generator)
    whole = nearest_neighbours(train, test, 12, CPU)
    # The last chunk of 90 = 11 * 8 + 2 is smaller than k.
    monkeypatch.setattr(measure, "TRAIN_CHUNK", 8)
    monkeypatch.setattr(measure, "TEST_CHUNK", 7)
    parts = nearest_neighbours(train, test, 12, CPU)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_leaving_each_image_out_equals_a_vote_of_the_others_also_among_copies() -> None:
    generator = torch.Generator().manual_seed(3)
    values, labels = torch.randn(60, 6, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    values[40:50] = values[40]
    for k in (1, 7, 100):
        right = 0
        for row in range(60):
            others = torch.arange(60) != row
            right += knn_accuracies(values[others], labels[others], values[row, None], labels[row, None], [k], CPU)[k] == 100
        if k != 1:  # which of equal copies votes is a matter of order
            assert leave_one_out_hits(Features({"last": values}, labels), k, CPU).sum() == right, k
