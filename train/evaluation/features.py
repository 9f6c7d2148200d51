"""Frozen features of a split's images: the extractors, and one pass over a split in bounded memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from model.hjepa import Level
from pipeline.loader import MultiCropLoader
from pipeline.shards.index import ShardIndex

Extractor = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""`[n, 3, S, S] float32, normalised -> {name: [n, D]}`; every extractor returns `last`."""

STORED_DTYPE = torch.float16  # half the memory of float32, at no visible cost in accuracy
MEMORY_SHARE = 0.5  # of the free memory, for the features of one split
LAST_BLOCKS = 4  # concatenated for the linear probe, as in DINO (arXiv 2104.14294)


@dataclass(frozen=True)
class Features:
    """`values`: `{name: [n, D] float16}` on the CPU; `labels`: `[n] int64`, -1 for unlabelled images."""

    values: dict[str, torch.Tensor]
    labels: torch.Tensor


def mixed_precision(crops: torch.Tensor) -> torch.autocast:
    """Return bf16 autocast on a GPU, as in training. CPUs are slower in bf16, so they compute in float32."""
    return torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.is_cuda)


def pooled_features(encoder: MultiCropEncoder) -> Extractor:
    """Return an extractor of `last`, `[n, D]`: the mean patch token after the final norm, as timm pools it."""
    return lambda crops: {"last": encoder([(crops, None)])[0].tokens.mean(dim=1)}


def encoder_features(encoder: MultiCropEncoder, levels: Sequence[Level]) -> Extractor:
    """Return an extractor of `last` as above, `last4` and `level_0` .. `level_i`.

    `last4`, `[n, 4 * D]`: the same of the last four blocks, or `last2` of an encoder with two. `level_i`, `[n, D]`: the mean of
    that level's target map, layer-normed as in the loss; the level's stride does not change the mean.
    """
    first = max(encoder.depth - LAST_BLOCKS, 0)
    layers = sorted({*range(first, encoder.depth), *(level.layer for level in levels)})

    def extractor(crops: torch.Tensor) -> dict[str, torch.Tensor]:
        (out,) = encoder([(crops, None)], layers)
        maps = dict(zip(layers, out.layers, strict=True))
        features = {"last": out.tokens.mean(dim=1)}
        blocks = [encoder.vit.norm(maps[layer]).mean(dim=1) for layer in range(first, encoder.depth)]
        features[f"last{len(blocks)}"] = torch.cat(blocks, dim=1)
        for number, level in enumerate(levels):
            tokens = maps[level.layer].float()
            features[f"level_{number}"] = F.layer_norm(tokens, tokens.shape[-1:]).mean(dim=1)
        return features

    return extractor


def pixels(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `last`, `[n, 3072]`: the crop shrunk to 32x32, or at its own size if that is smaller."""
    side = min(32, crops.shape[-1])
    return {"last": F.adaptive_avg_pool2d(crops, side).flatten(1)}


def colour_histogram(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `last`, `[n, 512]`: square roots of a joint histogram, 8 bins per channel over -2.5..2.5 (normalised units)."""
    bins = ((crops + 2.5) / 5 * 8).floor().clamp(0, 7).long()
    codes = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(crops), 512, device=crops.device)
    return {"last": counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32)).sqrt()}


def subsample_evenly(index: ShardIndex, max_samples: int) -> ShardIndex:
    """Return at most `max_samples` samples of the index, evenly spaced in stored order so that every class is represented.

    For remote data they come from a few evenly spaced shards, since each shard must be downloaded in full.
    """
    count = len(index)
    if count <= max_samples:
        return index
    rows = np.arange(count)
    if index.remote is not None:
        rows = _rows_of_few_shards(index.counts, max_samples)
    samples = index.samples[rows[np.arange(max_samples) * len(rows) // max_samples]]
    return replace(index, samples=samples, counts=np.bincount(samples["shard"], minlength=len(index.shards)))


def _rows_of_few_shards(counts: np.ndarray, min_samples: int) -> np.ndarray:
    """Return all rows of the fewest evenly spaced shards that hold at least `min_samples`."""
    used, first_rows = np.flatnonzero(counts), np.cumsum(counts) - counts
    for number in range(1, len(used) + 1):
        shards = used[np.arange(number) * len(used) // number]
        if counts[shards].sum() >= min_samples:
            break
    return np.concatenate([np.arange(first_rows[shard], first_rows[shard] + counts[shard]) for shard in shards])


@torch.inference_mode()
def extract(loader: MultiCropLoader, extractors: Mapping[str, Extractor]) -> dict[str, Features]:
    """Return each extractor's features of all samples of `loader`, in one pass.

    Raises ValueError when they would not fit in memory.
    """
    loader.load_state_dict({"epoch": 0, "position": 0})
    count, done = len(loader.index), 0
    stores: dict[tuple[str, str], torch.Tensor] = {}
    labels = torch.empty(count, dtype=torch.int64)
    for batch in loader:
        crops = batch.crops[0]
        with mixed_precision(crops):
            outputs = {(name, key): part for name in extractors for key, part in extractors[name](crops).items()}
        if not stores:  # only now are the widths known
            _check_memory(loader, count, sum(part.shape[1] for part in outputs.values()))
            stores = {key: torch.empty(count, part.shape[1], dtype=STORED_DTYPE) for key, part in outputs.items()}
        rows = slice(done, done + len(batch.labels))
        for key, part in outputs.items():
            stores[key][rows] = part.to("cpu", STORED_DTYPE)
        labels[rows] = batch.labels.cpu()
        done += len(batch.labels)
    if loader.index.remote is not None:
        loader.close()  # frees its shards, so that the cache has room for those of the training
    return {
        name: Features({key: values for (owner, key), values in stores.items() if owner == name}, labels)
        for name in extractors
    }


def _check_memory(loader: MultiCropLoader, count: int, width: int) -> None:
    per_image, room = width * STORED_DTYPE.itemsize, MEMORY_SHARE * free_memory()
    if per_image * count > room:
        raise ValueError(
            f"{loader.index.folder}: the features of {count:,} images need {per_image * count / 2**30:.1f} GiB, but only "
            f"{room / 2**30:.1f} GiB are available. Lower evaluation.max_samples (--max-samples) to {int(room / per_image):,} "
            "or less"
        )


def free_memory() -> int:
    """Return the bytes available on this machine."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return 1024 * int(fields["MemAvailable"].split()[0])
