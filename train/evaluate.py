"""Frozen features and their k-NN accuracy, with baselines that need no training."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from pipeline.batch import CropBatch
from pipeline.index import UNLABELLED
from pipeline.loader import MultiCropLoader

Extractor = Callable[[torch.Tensor], torch.Tensor]

KNN_TEMPERATURE = 0.07  # of the weighted vote, as in DINO (arXiv 2104.14294, appendix) and Wu et al. 2018


def pooled_features(encoder: MultiCropEncoder) -> Extractor:
    """`[n, 3, S, S] -> [n, D]`: the mean patch token, as timm pools it."""
    return lambda crops: encoder([(crops, None)])[0].tokens.mean(dim=1)


def pixels(crops: torch.Tensor) -> torch.Tensor:
    """`[n, 3, S, S] -> [n, 3072]`: the crop at 32x32 (or its own size, if that is smaller)."""
    side = min(32, crops.shape[-1])
    return F.adaptive_avg_pool2d(crops, side).flatten(1)


def colour_histogram(crops: torch.Tensor) -> torch.Tensor:
    """`[n, 3, S, S] -> [n, 512]`: square roots of a joint histogram, 8 bins per channel over -2.5..2.5 (normalised units)."""
    bins = ((crops + 2.5) / 5 * 8).floor().clamp(0, 7).long()
    codes = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(crops), 512, device=crops.device)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32)).sqrt()


@torch.inference_mode()
def extract(
    loader: MultiCropLoader, extractors: dict[str, Extractor], max_samples: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features `[n, D] float32` by name, and labels `[n]`, of the first `max_samples` samples in stored order."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in extractors}
    labels: list[torch.Tensor] = []
    loader.load_state_dict({"epoch": 0, "position": 0})
    batch: CropBatch
    for batch in loader:
        for name, extractor in extractors.items():
            parts[name].append(extractor(batch.crops[0]).float())
        labels.append(batch.labels)
        if sum(len(part) for part in labels) >= max_samples:
            break
    return {name: torch.cat(part)[:max_samples] for name, part in parts.items()}, torch.cat(labels)[:max_samples]


def knn_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, k: int
) -> float:
    """Percent of `test` (`[m, D]`) whose label wins the vote of its k nearest of `train` (`[n, D]`).

    Cosine similarity, votes weighted by exp(similarity / 0.07); k is lowered to n where there are fewer.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    correct = 0
    for part, wanted in zip(test.split(1024), test_labels.split(1024), strict=True):
        similarity, nearest = (part @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, train_labels[nearest], torch.exp(similarity / KNN_TEMPERATURE))
        correct += int((votes.argmax(dim=1) == wanted).sum())
    return 100.0 * correct / len(test)


def knn_table(
    train_loader: MultiCropLoader,
    test_loader: MultiCropLoader,
    extractors: dict[str, Extractor],
    k: int,
    max_samples: int,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """k-NN percent by extractor, and the test features. Raises ValueError for shards without labels."""
    train, train_labels = extract(train_loader, extractors, max_samples)
    test, test_labels = extract(test_loader, extractors, max_samples)
    if bool((train_labels == UNLABELLED).any()) or bool((test_labels == UNLABELLED).any()):
        raise ValueError(f"{train_loader.index.folder}: samples without labels; k-NN needs a label for each")
    scores = {name: knn_accuracy(train[name], train_labels, test[name], test_labels, k) for name in extractors}
    return scores, test
