"""Frozen features of a split's images, kept in bounded memory: pooled ones in one pass, tokens epoch after epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder, patchify
from model.hjepa import Level
from pipeline.loader import MultiCropLoader
from pipeline.shards.index import ShardIndex

Extractor = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""`[n, 3, S, S] float32, normalised -> {name: [n, D]}`; every extractor gives `last`."""

STORED = torch.float16  # half the memory; k-NN and probes do not notice
FEATURES_SHARE, TOKENS_SHARE = 0.5, 0.25  # of the free memory
LAST_BLOCKS = 4  # whose features the wide linear probe sees, as in DINO (arXiv 2104.14294)


@dataclass(frozen=True)
class Features:
    """`values`: `{name: [n, D] float16}` on the CPU; `labels`: `[n] int64`, -1 where there is none."""

    values: dict[str, torch.Tensor]
    labels: torch.Tensor


def mixed_precision(crops: torch.Tensor) -> torch.autocast:
    """bf16 autocast on a GPU, as in training; float32 on a CPU, which is slower in bf16."""
    return torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.is_cuda)


def pooled_features(encoder: MultiCropEncoder) -> Extractor:
    """`last`, `[n, D]`: the mean patch token after the final norm, as timm pools it."""
    return lambda crops: {"last": encoder([(crops, None)])[0].tokens.mean(dim=1)}


def encoder_features(encoder: MultiCropEncoder, levels: Sequence[Level]) -> Extractor:
    """`last` as above; `last4`, `[n, 4 * D]`: the same of the last four blocks, or as many as there are; and `level_0` ..

    `level_i`, `[n, D]`: the mean of that level's target map, layer-normed as the loss does; its stride does not move the mean.
    """
    first = max(encoder.depth - LAST_BLOCKS, 0)
    layers = sorted({*range(first, encoder.depth), *(level.layer for level in levels)})

    def features(crops: torch.Tensor) -> dict[str, torch.Tensor]:
        (out,) = encoder([(crops, None)], layers)
        maps = dict(zip(layers, out.layers, strict=True))
        found = {"last": out.tokens.mean(dim=1)}
        blocks = [encoder.vit.norm(maps[layer]).mean(dim=1) for layer in range(first, encoder.depth)]
        found[f"last{len(blocks)}"] = torch.cat(blocks, dim=1)
        for rung, level in enumerate(levels):
            tokens = maps[level.layer].float()
            found[f"level_{rung}"] = F.layer_norm(tokens, tokens.shape[-1:]).mean(dim=1)
        return found

    return features


def pixels(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """`last`, `[n, 3072]`: the crop at 32x32, or its own size if that is smaller."""
    side = min(32, crops.shape[-1])
    return {"last": F.adaptive_avg_pool2d(crops, side).flatten(1)}


def colour_histogram(crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """`last`, `[n, 512]`: square roots of a joint histogram, 8 bins per channel over -2.5..2.5 (normalised units)."""
    bins = ((crops + 2.5) / 5 * 8).floor().clamp(0, 7).long()
    codes = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(crops), 512, device=crops.device)
    return {"last": counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32)).sqrt()}


def patch_tokens(encoder: MultiCropEncoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """`[n, 3, S, S] -> [n, N, D]`: patch tokens after the final norm."""
    return lambda crops: encoder([(crops, None)])[0].tokens


def pixel_tokens(patch_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """`[n, 3, S, S] -> [n, N, 3 * p * p]`: the pixels of each patch."""
    return lambda crops: patchify(crops, patch_size).contiguous()


def spread_rows(index: ShardIndex, most: int) -> ShardIndex:
    """At most `most` samples of the index, evenly spread over its stored order, so that no class is cut off.

    Of a store they are all samples of a few shards, themselves evenly spread, as every shard has to be fetched whole.
    """
    count = len(index)
    if count <= most:
        return index
    rows = np.arange(most) * count // most
    if index.remote is not None:
        rows = _rows_of_few_shards(index.counts, most)
    samples = index.samples[rows]
    return replace(index, samples=samples, counts=np.bincount(samples["shard"], minlength=len(index.shards)))


def _rows_of_few_shards(counts: np.ndarray, most: int) -> np.ndarray:
    used, firsts = np.flatnonzero(counts), np.cumsum(counts) - counts
    for number in range(1, len(used) + 1):
        shards = used[np.arange(number) * len(used) // number]
        if counts[shards].sum() >= most:
            break
    rows = np.concatenate([np.arange(firsts[shard], firsts[shard] + counts[shard]) for shard in shards])
    return rows[np.arange(most) * len(rows) // most]


@torch.inference_mode()
def extract(loader: MultiCropLoader, extractors: dict[str, Extractor]) -> dict[str, Features]:
    """Features of all samples of `loader`, by extractor, in one pass. ValueError when they would not fit in memory."""
    loader.load_state_dict({"epoch": 0, "position": 0})
    count, done = len(loader.index), 0
    stores: dict[str, dict[str, torch.Tensor]] = {name: {} for name in extractors}
    labels = torch.empty(count, dtype=torch.int64)
    for batch in loader:
        with mixed_precision(batch.crops[0]):
            found = {name: extractor(batch.crops[0]) for name, extractor in extractors.items()}
        if done == 0:
            _check_room(loader, count, found)
            for name, parts in found.items():
                stores[name] = {key: torch.empty(count, part.shape[1], dtype=STORED) for key, part in parts.items()}
        here = slice(done, done + len(batch.labels))
        for name, parts in found.items():
            for key, part in parts.items():
                stores[name][key][here] = part.to("cpu", STORED)
        labels[here] = batch.labels.cpu()
        done += len(batch.labels)
    if loader.index.remote is not None:
        loader.close()  # its shards make room in the cache for those of the training
    return {name: Features(store, labels) for name, store in stores.items()}


def _check_room(loader: MultiCropLoader, count: int, found: dict[str, dict[str, torch.Tensor]]) -> None:
    width = sum(part.shape[1] for parts in found.values() for part in parts.values())
    need, room = width * STORED.itemsize * count, FEATURES_SHARE * free_memory()
    if need > room:
        most = int(room / (width * STORED.itemsize))
        raise ValueError(
            f"{loader.index.folder}: the features of {count:,} images take {need / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are "
            f"available. Lower evaluation.max_samples (--max-samples) to {most:,} or less"
        )


class TokenStream:
    """Batches of (tokens `[n, N, D] float32`, labels `[n]`, positions `[n]`) of a split, epoch after epoch.

    Tokens that fit in a share of the free memory are computed once and kept as float16; otherwise each epoch computes them again.
    """

    def __init__(self, loader: MultiCropLoader, tokens: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._loader, self._tokens = loader, tokens
        self._store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    @property
    def batches(self) -> int:
        """Of one epoch."""
        return len(self._loader)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if self._store is not None:
            for tokens, labels, positions in self._store:
                yield tokens.to(labels.device).float(), labels, positions
            return
        store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = []
        room, taken = TOKENS_SHARE * free_memory(), 0
        self._loader.load_state_dict({"epoch": 0, "position": 0})
        for batch in self._loader:
            with torch.inference_mode(), mixed_precision(batch.crops[0]):
                found = self._tokens(batch.crops[0]).to(STORED)
            taken += found.nbytes
            if store is not None:
                store.append((found.cpu(), batch.labels, batch.positions))
                store = store if taken <= room else None
            yield found.float(), batch.labels, batch.positions
        self._store = store


def free_memory() -> int:
    """Bytes available on this machine."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return 1024 * int(fields["MemAvailable"].split()[0])
