"""Placement accuracy: how often a token of one crop finds its place in another crop of its image. It needs no labels."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder, patchify
from model.geometry import cell_centres
from model.hjepa import Level, join_crops
from pipeline.shards.index import ShardIndex
from train.build import build_pair_loader
from train.config.schema import Config
from train.evaluation.features import mixed_precision, subsample_evenly

MIN_IMAGES, MAX_IMAGES = 32, 256
EVALUATED_PER_PAIR = 64  # an evaluation that encodes fewer images than this for each pair takes over 2 % longer

Tokens = dict[str, torch.Tensor]
"""`[n, N, D]` by name, N = cells of a square crop, row-major."""
DenseExtractor = Callable[[torch.Tensor], Tokens]
"""`[n, 3, S, S] uint8 -> Tokens`; every extractor returns `last`."""


def dense_features(encoder: MultiCropEncoder, levels: Sequence[Level] = ()) -> DenseExtractor:
    """Return an extractor of `last`, the patch tokens after the final norm, and `level_0` .. of the levels' blocks.

    Those are layer-normed as in the loss, and not pooled, so that all have the same cells.
    """

    def extractor(crops: torch.Tensor) -> Tokens:
        (output,) = encoder([(crops, None)], layers=[level.layer for level in levels])
        maps = {f"level_{rung}": F.layer_norm(layer, layer.shape[-1:]) for rung, layer in enumerate(output.layers)}
        return {"last": output.tokens, **maps}

    return extractor


def patch_pixels(patch_size: int) -> DenseExtractor:
    """Return an extractor of the pixels of each patch less their mean."""

    def extractor(crops: torch.Tensor) -> Tokens:
        patches = patchify(crops, patch_size).float()
        return {"last": patches - patches.mean(dim=-1, keepdim=True)}

    return extractor


class Placement:
    """Two global crops of each of at most `max_images` images: the same ones in every run with the same images and crops.

    Boxes and mirroring are drawn as in training, colours stay as they are. The crops are kept as bytes, since to make them
    again costs more than to encode them. `count`: of the pairs. Raises ValueError when too many images are damaged.
    """

    def __init__(self, config: Config, index: ShardIndex, max_images: int = MAX_IMAGES) -> None:
        loader = build_pair_loader(config, subsample_evenly(index, max_images))
        self._batches = [(join_crops(batch.crops).clone(), batch.boxes, batch.flips) for batch in loader]
        loader.close()
        self.count = sum(len(boxes) for _, boxes, _ in self._batches)

    def baselines(self, patch_size: int) -> dict[str, float]:
        """Return the accuracies of `chance` and of raw `pixels`."""
        cells = (self._batches[0][0].shape[-1] // patch_size) ** 2
        return {"chance": 100 / cells, "pixels": self.measure(patch_pixels(patch_size))["last"]}

    @torch.inference_mode()
    def measure(self, extractor: DenseExtractor) -> dict[str, float]:
        """Return by the name of the features the percentage of cells that find their place.

        Counted are the cells of the first crop whose centre lies in the second. Such a cell is right if the second crop's token
        with the highest cosine similarity is that of the cell that holds the centre.
        """
        right: dict[str, list[torch.Tensor]] = {}
        for crops, boxes, flips in self._batches:
            with mixed_precision(crops):
                features = extractor(crops)
            for name, tokens in features.items():
                right.setdefault(name, []).append(placed_right(tokens.unflatten(0, (-1, 2)), boxes, flips))
        return {name: 100 * float(torch.cat(parts).float().mean()) for name, parts in right.items()}


def placed_right(tokens: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Return a bool for each cell of a first crop whose centre lies in the second: True if its token finds the place.

    `tokens`: `[n, 2, N, D]`, `boxes`: `[n, 2, 4]`, `flips`: `[n, 2]`, as in `CropBatch`.
    """
    places = same_places(boxes, flips, math.isqrt(tokens.shape[2]))
    first, second = F.normalize(tokens.float(), dim=-1).unbind(dim=1)
    return ((first @ second.mT).argmax(dim=-1) == places)[places >= 0]


def same_places(boxes: torch.Tensor, flips: torch.Tensor, grid: int) -> torch.Tensor:
    """Return for each cell of the first crop the cell of the second that holds its centre, `[n, grid^2] int64`, -1 for none."""
    low, high = boxes[:, 1, None].split(2, dim=-1)
    inside = (cell_centres(boxes[:, 0], flips[:, 0], grid) - low) / (high - low)
    y, x = inside.unbind(dim=-1)
    x = torch.where(flips[:, 1, None], 1 - x, x)
    row, column = ((grid * part).long().clamp(0, grid - 1) for part in (y, x))
    return torch.where(((inside >= 0) & (inside < 1)).all(dim=-1), row * grid + column, -1)
