"""Is the dense probe answerable? `python -m tools.studies.dense_bound CONFIG MASKS SECONDS [KEY=VALUE ...]`.

Trains the config's encoder end to end with the masks, by a linear head on its tokens, for some CPU seconds, and prints the dense
probe of its frozen tokens beside raw patches and the untrained encoder: where it is not far ahead, methods cannot be compared.
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from model.encoder import patchify
from tools.studies.training import CPU, DENSE_PATCHES
from train.build import build_encoder
from train.config.load import load_config
from train.evaluation.dense import IGNORED, dense_figures, dense_table, find_masks, raw_patches
from train.evaluation.placement import dense_features
from train.optim import build_optimizer, cosine

BATCH, WARMUP = 32, 40


def main(path: str, folder: str, seconds: str, *settings: str) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(path), [*settings, "device=cpu"])
    encoder, untrained = build_encoder(config), build_encoder(config).requires_grad_(False)
    size, patch, training = config.data.multicrop.global_crop_size, encoder.patch_size, config.training
    images, masks = (torch.cat(part) for part in zip(*find_masks(Path(folder), "train").batches(size), strict=True))
    classes = 1 + int(masks[masks != IGNORED].max())
    head = nn.Linear(encoder.width, patch**2 * classes)
    parts = nn.ModuleList([encoder, head])
    optimizer = build_optimizer(parts, training.weight_decay, training.betas, training.optimizer)
    started, steps = time.process_time(), 0
    while (used := (time.process_time() - started) / float(seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = cosine(training.lr, 0.0, used) * min(1.0, (steps + 1) / WARMUP)
        rows, shift = torch.randint(len(images), (BATCH,)), torch.randint(-size // 4, size // 4, (2,)).tolist()
        crops, truth = images[rows].roll(shift, (2, 3)), masks[rows].roll(shift, (1, 2))
        if steps % 2:
            crops, truth = crops.flip(3), truth.flip(2)
        (out,) = encoder([(crops, None)])
        logits = head(out.tokens).unflatten(2, (-1, classes)).permute(0, 3, 1, 2)
        optimizer.zero_grad()
        F.cross_entropy(logits, patchify(truth[:, None], patch).long(), ignore_index=IGNORED).backward()
        optimizer.step()
        steps += 1
    tokens = {"random_init": dense_features(untrained), "trained": dense_features(encoder.requires_grad_(False))}
    figures = dense_figures(Path(folder), {"pixels": raw_patches(patch), **tokens}, config, patch, CPU, DENSE_PATCHES)
    print(dense_table({"checkpoint": f"supervised, {steps * BATCH:,} images", "masks": folder, "figures": figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
