"""How much could a dense probe reach? `python -m tools.studies.dense_bound CONFIG MASKS [KEY=VALUE ...] --budget S`.

Trains the config's encoder end to end with the masks, by a linear head on its tokens, for S CPU seconds, and prints the dense
probe of its frozen tokens beside raw patches and the untrained encoder: a task where it is not far ahead compares no methods.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from model.encoder import patchify
from train.build import build_encoder
from train.command import path_argument
from train.config.load import load_config
from train.evaluation.dense import IGNORED, dense_figures, dense_table, find_masks, raw_patches
from train.evaluation.placement import dense_features
from train.optim import build_optimizer, cosine

BATCH, WARMUP, STUDY_PATCHES = 32, 40, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=path_argument)
    parser.add_argument("masks", type=path_argument)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--budget", type=float, default=150.0, metavar="S", help="CPU seconds of training.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config, [*options.overrides, "device=cpu"])
    size = config.data.multicrop.global_crop_size
    encoder, untrained = build_encoder(config), build_encoder(config).requires_grad_(False)
    patch = encoder.patch_size
    images, masks = (torch.cat(part) for part in zip(*find_masks(options.masks, "train").batches(size), strict=True))
    classes = 1 + int(masks[masks != IGNORED].max())
    head = nn.Linear(encoder.width, classes * patch**2)  # every pixel of the patch from its token
    training = config.training
    optimizer = build_optimizer(nn.ModuleList([encoder, head]), training.weight_decay, training.betas, training.optimizer)
    started, steps = time.process_time(), 0
    while (used := (time.process_time() - started) / options.budget) < 1:
        for group in optimizer.param_groups:
            group["lr"] = cosine(training.lr, 0.0, used) * min(1.0, (steps + 1) / WARMUP)
        rows = torch.randint(len(images), (BATCH,))
        crops, truth = images[rows], masks[rows]
        if steps % 2:  # flipped
            crops, truth = crops.flip(3), truth.flip(2)
        shifts = torch.randint(-size // 4, size // 4, (2,)).tolist()
        crops, truth = crops.roll(shifts, (2, 3)), truth.roll(shifts, (1, 2))
        (out,) = encoder([(crops.contiguous(), None)])
        logits = head(out.tokens).unflatten(2, (patch**2, classes)).permute(0, 3, 1, 2)
        loss = F.cross_entropy(logits, patchify(truth[:, None], patch).long(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    encoder.requires_grad_(False)
    rows_of = {"pixels": raw_patches(patch), "random_init": dense_features(untrained), "trained": dense_features(encoder)}
    figures = dense_figures(options.masks, rows_of, config, patch, torch.device("cpu"), STUDY_PATCHES)
    print(dense_table({"checkpoint": f"supervised, {steps * BATCH:,} images", "masks": str(options.masks), "figures": figures}))


if __name__ == "__main__":
    main()
