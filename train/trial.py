"""A step of the run's model on crops of noise: what it takes without its data."""

from collections.abc import Callable

import torch

from model.hjepa import HJEPA
from model.losses import random_directions
from train.build import build_masks, build_model, loop_settings
from train.config.schema import Config


def trial_step(config: Config, device: torch.device) -> tuple[HJEPA, Callable[[], None]]:
    """The model of `config`, and a call that computes its loss and gradients on one batch and waits for the device."""
    count = config.data.batch_size
    (num_global, num_local), crops = config.data.crop_counts, config.data.multicrop
    sizes = [crops.global_crop_size] * num_global + [crops.local_crop_size] * num_local
    settings = loop_settings(config, 1, device)
    model = build_model(config, device)
    masks = build_masks(config, model, device)
    images = [torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device) for size in sizes]
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(count, len(sizes), 4)
    flips = torch.zeros(count, len(sizes), dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(0)
    directions = random_directions(config.model.projector_dim, config.loss.sigreg_slices, generator, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.use_amp):
            loss = model(images, boxes, flips, masks(count), directions)["loss"]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return model, step
