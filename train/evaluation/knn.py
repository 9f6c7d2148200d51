"""Weighted k-NN on frozen features, in chunks."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

KNN_TEMPERATURE = 0.07  # of the weighted vote, as in DINO (arXiv 2104.14294, appendix) and Wu et al. 2018
TRAIN_CHUNK, TEST_CHUNK = 32_768, 1024  # one block of similarities is 128 MiB


def nearest_neighbours(
    train: torch.Tensor, test: torch.Tensor, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities `[m, k] float32`, highest first, and rows of `train` `[m, k] int64`, on `device`.

    `train`: `[n, D]`, `test`: `[m, D]`, of any floating type, on any device. k is lowered to n where there are fewer.
    """
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(train), TRAIN_CHUNK):
        keys = F.normalize(train[start : start + TRAIN_CHUNK].to(device).float(), dim=1).T
        for number, part in enumerate(test.split(TEST_CHUNK)):
            similarity = F.normalize(part.to(device).float(), dim=1) @ keys
            found, rows = similarity.topk(min(k, keys.shape[1]), dim=1)
            rows = rows + start
            if start:
                found, rows = (torch.cat(pair, dim=1) for pair in zip(best[number], (found, rows), strict=True))
                found, order = found.topk(min(k, found.shape[1]), dim=1)
                best[number] = (found, rows.gather(1, order))
            else:
                best.append((found, rows))
    similarities, neighbours = zip(*best, strict=True)
    return torch.cat(similarities), torch.cat(neighbours)


def knn_accuracies(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    ks: Sequence[int],
    device: torch.device | None = None,
) -> dict[int, float]:
    """By k: the percent of `test` (`[m, D]`) whose label wins the vote of its k nearest of `train` (`[n, D]`).

    Votes are weighted by exp(cosine similarity / 0.07); k is lowered to n where there are fewer.
    """
    device = device or train.device
    similarity, rows = nearest_neighbours(train, test, max(ks), device)
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    labels, weights = train_labels.to(device)[rows], torch.exp(similarity / KNN_TEMPERATURE)
    right = dict.fromkeys(ks, 0)
    for label, weight, wanted in zip(
        labels.split(TEST_CHUNK), weights.split(TEST_CHUNK), test_labels.to(device).split(TEST_CHUNK), strict=True
    ):
        for k in ks:
            votes = torch.zeros(len(label), classes, device=device)
            votes.scatter_add_(1, label[:, :k], weight[:, :k])
            right[k] += int((votes.argmax(dim=1) == wanted).sum())
    return {k: 100.0 * count / len(test) for k, count in right.items()}
