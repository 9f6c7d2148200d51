"""The dense probe: k-NN and linear segmentation on frozen patch tokens, scored by the mean IoU of pixels.

The protocol is CAPI's (arXiv 2502.08769, its eval_segmentation.py): images and masks are resized to a square, tokens are
standardized, a patch is trained on its most frequent class, and a prediction fills its patch. Every tenth training image chooses
k and the learning rate. The row `limit` gives every patch its most frequent class: what patches of this size allow.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from model.encoder import patchify
from pipeline.shards.side_folders import MASK_END
from pipeline.text import markdown_table
from train.checkpoint import checkpoint_step
from train.config.schema import Config
from train.evaluation.features import STORED_DTYPE, mixed_precision
from train.evaluation.measure import LINEAR_RATES, Standardizer, is_held_out, linear_heads, nearest_neighbours, vote
from train.evaluation.offline import ROW_NAMES, open_encoders
from train.evaluation.placement import DenseExtractor, dense_features

IGNORED = 255  # the class of pixels that do not count
NUM_CLASSES = 256  # of 8-bit masks
SCORES = ("miou", "boundaries", "small")
KS = (1, 3, 10, 30)
EPOCHS = 5
MAX_PATCHES = 100_000  # of the training images, for bounded memory and time
BATCH = 50  # images
SMALL_PATCHES = 4  # a connected region of a class other than 0 with less area than this many patches is a small object
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the 19 classes, in their order
LAYOUTS = "train/ and val/ with NAME.seg.png beside images, or a tree of VOC, ADE20K or Cityscapes"

Classifier = Callable[[torch.Tensor], torch.Tensor]
"""Standardized tokens `[m, D] float32 -> [m] int64` classes."""

log = logging.getLogger(__name__)


class MaskedImages(NamedTuple):
    """Images with masks beside them. `classes`: the class of each value of a mask, `[256] uint8`."""

    images: Sequence[Path]
    masks: Sequence[Path]
    classes: np.ndarray

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images `[n, 3, size, size] uint8` and classes `[n, size, size] uint8`, 255 where pixels do not count."""
        for start in range(0, len(self.images), BATCH):
            rows = range(start, min(start + BATCH, len(self.images)))
            pairs = [read_pair(self.images[row], self.masks[row], size) for row in rows]
            images, masks = (np.stack(part) for part in zip(*pairs, strict=True))
            yield torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.classes[masks])


def read_pair(image: Path, mask: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image `[size, size, 3] uint8` and the values of its mask `[size, size] uint8`. Raises ValueError."""
    try:
        with Image.open(image) as picture, Image.open(mask) as values:
            if values.mode not in ("L", "P", "1"):
                raise ValueError(f"{mask}: a mask of mode {values.mode}; it needs 8 bits per pixel, the number of the class")
            pixels = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            return np.asarray(pixels), np.asarray(values.resize((size, size), Image.Resampling.NEAREST), dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"{image} with {mask.name}: cannot be read ({error})") from None


def find_masks(folder: Path, split: str, max_images: int | None = None) -> MaskedImages:
    """Return the images of `train` or `val`, at most `max_images` of them, evenly spaced.

    `folder` is one of LAYOUTS. Raises FileNotFoundError without masks, and for a mask without its image.
    """
    classes = np.arange(NUM_CLASSES, dtype=np.uint8)
    longer = {"train": "training", "val": "validation"}[split]
    if (folder / "SegmentationClass").is_dir():
        names = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        masks = [folder / "SegmentationClass" / f"{name}.png" for name in names]
        stems = [folder / "JPEGImages" / name for name in names]
    elif (folder / "annotations").is_dir():
        masks = sorted((folder / "annotations" / longer).glob("*.png"))
        stems = [folder / "images" / longer / mask.stem for mask in masks]
        classes -= 1  # 0 stands for pixels without a class
    elif (folder / "gtFine").is_dir():
        masks = sorted((folder / "gtFine" / split).glob("*/*_labelIds.png"))
        names = [f"{mask.parent.name}/{mask.name.removesuffix('_gtFine_labelIds.png')}_leftImg8bit" for mask in masks]
        stems = [folder / "leftImg8bit" / split / name for name in names]
        classes[:] = IGNORED
        classes[list(CITYSCAPES_IDS)] = range(len(CITYSCAPES_IDS))
    else:
        masks = sorted((folder / split).rglob(f"*{MASK_END}"))
        stems = [mask.with_name(mask.name.removesuffix(MASK_END)) for mask in masks]
    if not masks:
        raise FileNotFoundError(f"{folder}: no masks of {split} here; it must hold {LAYOUTS}")
    if max_images is not None and len(masks) > max_images:
        rows = [number * len(masks) // max_images for number in range(max_images)]
        masks, stems = [masks[row] for row in rows], [stems[row] for row in rows]
    return MaskedImages([image_of(stem) for stem in stems], masks, classes)


def image_of(stem: Path) -> Path:
    """Return the image at a path without extension. Raises FileNotFoundError."""
    for extension in (".jpg", ".png", ".jpeg"):
        if (path := stem.with_name(stem.name + extension)).is_file():
            return path
    raise FileNotFoundError(f"{stem}: no .jpg, .png or .jpeg image of that name, which has a mask")


def patch_counts(masks: torch.Tensor, patch: int) -> torch.Tensor:
    """Return how many pixels of each class every patch has: `[n, S, S] uint8 -> [n * N, 256] int64`, row-major patches."""
    cells = masks.long().unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3).flatten(0, 2)
    places = cells + NUM_CLASSES * torch.arange(len(cells))[:, None]
    return torch.bincount(places.flatten(), minlength=NUM_CLASSES * len(cells)).unflatten(0, (-1, NUM_CLASSES))


def majority(counts: torch.Tensor) -> torch.Tensor:
    """Return the most frequent class of each patch, the lowest of equal ones; 255 where all pixels are ignored."""
    known = counts[:, :IGNORED]
    return torch.where(known.sum(dim=1) > 0, known.argmax(dim=1), IGNORED)


def small_objects(masks: torch.Tensor, area: int) -> torch.Tensor:
    """Return the masks with everything ignored but connected regions of a class other than 0 with less than `area` pixels."""
    small = torch.full_like(masks, IGNORED)
    for mask, kept in zip(masks.numpy(), small.numpy(), strict=True):
        for value in set(np.unique(mask).tolist()) - {0, IGNORED}:
            regions, _ = ndimage.label(mask == value)
            kept[(np.bincount(regions.ravel()) < area)[regions] & (regions > 0)] = value
    return small


def confusion(counts: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return pixels by class and prediction, `[256, 256] int64`, of patches with `counts [m, 256]` and predictions `[m]`."""
    return torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64).index_add_(1, predicted, counts.T)


def mean_iou(matrix: torch.Tensor) -> float | None:
    """Return the mean IoU of the classes that have pixels, in percent, from a `confusion`; None where no pixel counts."""
    known = matrix[:IGNORED].double()
    truth, predicted, hits = known.sum(dim=1), known.sum(dim=0)[:IGNORED], known.diagonal()
    present = truth > 0
    return float(100 * (hits / (truth + predicted - hits))[present].mean()) if present.any() else None


def raw_patches(patch: int) -> DenseExtractor:
    """Return an extractor of the pixels of each patch."""
    return lambda crops: {"last": patchify(crops, patch).float() / 255}


def tokens_of(extractor: DenseExtractor, crops: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tokens `[n, N, D] float16`, on the CPU, of crops `[n, 3, S, S] uint8`."""
    crops = crops.to(device)
    with mixed_precision(crops):
        return extractor(crops)["last"].to("cpu", STORED_DTYPE)


class Patches:
    """The patches that train the classifiers, as many of each image, drawn with a fixed seed.

    `tokens`: `{row: [m, D] float16}`; `labels` and `held_out`: `[m]` int64 and bool.
    """

    def __init__(
        self, data: MaskedImages, rows: Mapping[str, DenseExtractor], size: int, patch: int, limit: int, device: torch.device
    ) -> None:
        share, generator = max(1, limit // len(data.images)), torch.Generator().manual_seed(0)
        tokens: dict[str, list[torch.Tensor]] = {name: [] for name in rows}
        labels, held_out = [], []
        for first, (crops, masks) in zip(range(0, len(data.images), BATCH), data.batches(size), strict=True):
            truth = majority(patch_counts(masks, patch)).unflatten(0, (len(crops), -1))
            ranks = torch.rand(truth.shape, generator=generator).argsort(dim=1).argsort(dim=1)
            chosen = (ranks < share) & (truth != IGNORED)
            for name, extractor in rows.items():
                tokens[name].append(tokens_of(extractor, crops, device)[chosen])
            labels.append(truth[chosen])
            held_out.append(is_held_out(first + chosen.nonzero()[:, 0]))
        self.tokens = {name: torch.cat(parts) for name, parts in tokens.items()}
        self.labels, self.held_out = torch.cat(labels), torch.cat(held_out)


def fit(patches: Patches, name: str, device: torch.device) -> dict[str, tuple[Classifier, str]]:
    """Return the classifiers `knn` and `linear` of one row, each with its setting, chosen by the held-out patches' mean IoU."""
    tokens, labels, held_out = patches.tokens[name], patches.labels, patches.held_out
    standardizer, classes = Standardizer(tokens[~held_out], device), 1 + int(labels.max())
    keys, values = standardizer(tokens[~held_out]), labels[~held_out].to(device)

    def knn(ks: Sequence[int], queries: torch.Tensor) -> list[torch.Tensor]:
        similarity, rows = nearest_neighbours(keys, standardizer(queries), max(ks), device)
        return [vote(values[rows[:, :k]], similarity[:, :k], classes).cpu() for k in ks]

    def linear(head: nn.Module, queries: torch.Tensor) -> torch.Tensor:
        return head(standardizer(queries)).argmax(dim=1).cpu()

    with torch.enable_grad():
        heads = linear_heads(tokens[~held_out], labels[~held_out], classes, LINEAR_RATES, EPOCHS, standardizer)
    truth, others = F.one_hot(labels[held_out], NUM_CLASSES), tokens[held_out]
    of_k, of_rate = (
        [mean_iou(confusion(truth, predicted)) or 0.0 for predicted in predictions]
        for predictions in (knn(KS, others), [linear(head, others) for head in heads])
    )
    k, best = KS[of_k.index(max(of_k))], of_rate.index(max(of_rate))
    return {
        "knn": (lambda queries: knn([k], queries)[0], f"k={k}"),
        "linear": (partial(linear, heads[best]), f"lr {LINEAR_RATES[best]:g}"),
    }


@torch.no_grad()
def dense_figures(
    folder: Path, rows: Mapping[str, DenseExtractor], config: Config, patch: int, device: torch.device,
    max_patches: int = MAX_PATCHES,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the figures of each row and of `limit`: mean IoU of all pixels, of `boundaries` and of `small` objects, in percent.

    Boundaries are the patches with more than one class. `rows`: extractors, of which `last` is used. Raises ValueError and
    FileNotFoundError as `find_masks` does.
    """
    size = config.data.multicrop.global_crop_size
    train, val = (find_masks(folder, split, config.evaluation.max_samples) for split in ("train", "val"))
    log.info(f"dense probe: {len(train.images):,} + {len(val.images):,} images of {folder} ...")
    patches = Patches(train, rows, size, patch, max_patches, device)
    fitted = {name: fit(patches, name, device) for name in rows}
    settings = {(name, probe): text for name, probes in fitted.items() for probe, (_, text) in probes.items()}
    settings["limit", ""] = f"patches of {patch}"
    matrices = {key: torch.zeros(len(SCORES), NUM_CLASSES, NUM_CLASSES, dtype=torch.int64) for key in settings}
    for crops, masks in val.batches(size):
        counts = patch_counts(masks, patch)
        mixed = (counts[:, :IGNORED] > 0).sum(dim=1, keepdim=True) > 1
        parts = (counts, counts * mixed, patch_counts(small_objects(masks, SMALL_PATCHES * patch**2), patch))
        predicted = {("limit", ""): majority(counts)}
        for name, probes in fitted.items():
            tokens = tokens_of(rows[name], crops, device).flatten(0, 1)
            predicted |= {(name, probe): classifier(tokens) for probe, (classifier, _) in probes.items()}
        for key, classes in predicted.items():
            matrices[key] += torch.stack([confusion(part, classes) for part in parts])
    keys = ("features", "probe", "setting", *SCORES)
    return [dict(zip(keys, (*key, settings[key], *map(mean_iou, three)), strict=True)) for key, three in matrices.items()]


def evaluate_dense(checkpoint: Path, config: Config, folder: Path) -> dict[str, Any]:
    """Return the figures of raw patches, random initialisation, starting weights where there are, and the trained encoder."""
    device, model, encoders = open_encoders(checkpoint, config)
    patch = model.target.patch_size
    rows = {"pixels": raw_patches(patch), **{name: dense_features(encoder) for name, encoder in encoders.items()}}
    figures = dense_figures(folder, rows, config, patch, device)
    return {"checkpoint": str(checkpoint), "step": checkpoint_step(checkpoint), "masks": str(folder), "figures": figures}


def dense_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    names = ROW_NAMES | {"pixels": "raw patches", "limit": "the right class of every patch"}
    rows = [
        (names[row["features"]], row["probe"], row["setting"], *("" if row[key] is None else f"{row[key]:.1f}" for key in SCORES))
        for row in report["figures"]
    ]
    head = ("tokens", "probe", "setting", "mIoU, %", "boundaries", "small objects")
    return f"{report['checkpoint']}: mean IoU of pixels, {report['masks']}\n\n{markdown_table(head, rows)}"
