"""How much memory a step takes, and which settings would take less: the answer to an out-of-memory error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.crops.device import is_out_of_memory
from pipeline.shards.index import ShardIndex
from train.build import amp_enabled, build_masks, build_model, crop_sizes
from train.config.schema import Config
from train.step import noise_inputs

IMAGES = 2  # enough for batch statistics
USABLE = 0.9  # of the memory: the rest goes to buffers, the crops and fragmentation
COPIES = 4  # float32 weight, gradient and two moments of each trained weight


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank. `per_image`: for the global crops of an image; `per_local`: for each of its local crops."""

    fixed: float
    per_image: float
    per_local: float

    def total(self, batch_size: int, num_local: int, local_share: float = 1.0) -> float:
        """With `num_local` crops that hold `local_share` of the tokens they held when this was measured."""
        return self.fixed + batch_size * (self.per_image + num_local * local_share * self.per_local)

    def scaled(self, factor: float) -> "StepMemory":
        return StepMemory(*(factor * value for value in (self.fixed, self.per_image, self.per_local)))


def measure_step(config: Config, amp: bool) -> StepMemory:
    """From what the forward pass of two images keeps for the backward pass, with all local crops and with one; on the CPU."""
    num_local = config.data.crop_counts[1]
    model = build_model(config, torch.device("cpu"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in model.parameters()) - trained
    fixed = 4.0 * (COPIES * trained + kept)
    whole = kept_bytes(config, amp) / IMAGES
    if num_local < 2:
        return StepMemory(fixed, whole, 0.0)
    crops = config.data.multicrop.model_copy(update={"num_local_crops": 1})
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"multicrop": crops})})
    per_local = (whole - kept_bytes(fewer, amp) / IMAGES) / (num_local - 1)
    return StepMemory(fixed, whole - num_local * per_local, per_local)


def kept_bytes(config: Config, amp: bool) -> int:
    """What autograd keeps of the forward pass of `IMAGES` images, weights left out."""
    device = torch.device("cpu")
    model = build_model(config, device)
    plan = build_masks(config, model, device)(IMAGES)
    crops, boxes, flips, directions = noise_inputs(config, IMAGES, device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with storages_kept() as kept, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model(crops, boxes, flips, plan, directions)
        total = sum(size for place, size in kept.items() if place not in weights)
    del losses
    return total


@contextmanager
def storages_kept() -> Iterator[dict[int, int]]:
    """Fills a dict with the bytes of every storage that autograd keeps while this is open, by address."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def pipeline_bytes(config: Config, index: ShardIndex) -> float:
    """Estimate of what DALI holds: the crops of the batches made ahead and of the one in use, and of the batch in the making
    the decoded images and the crops in float32. On the device on which crops are made."""
    pixels = sum(size**2 for size in crop_sizes(config))
    decoded = float((index.samples["height"].astype(float) * index.samples["width"]).mean())
    return 3 * config.data.batch_size * ((config.data.prefetch + 1) * pixels + 4 * pixels + decoded)


def device_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    with open("/proc/meminfo") as file:
        return 1024 * int(file.readline().split()[1])


def held_by_others(device: torch.device) -> int:
    """Bytes of the GPU that are in use and not by torch's allocator: DALI's pool, the CUDA context, other processes."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def remedies(config: Config, memory: StepMemory, budget: float) -> list[str]:
    """The guide's three remedies, each with the largest value that fits `budget` bytes, or that it is not enough alone.

    An estimate `memory` below the budget is scaled to exceed it, because the step did not fit.
    """
    batch, num_local = config.data.batch_size, config.data.crop_counts[1]
    size, patch = config.data.multicrop.local_crop_size, config.model.patch_size or 1
    need = memory.total(batch, num_local)
    memory = memory.scaled(max(1.0, 1.01 * budget / need))
    fits = USABLE * budget
    locals_ = (n for n in range(num_local - 1, -1, -1) if memory.total(batch, n) <= fits)
    batches = (n for n in range(batch - 1, 0, -1) if memory.total(n, num_local) <= fits)
    sizes = (n for n in range(size - patch, 0, -patch) if memory.total(batch, num_local, (n / size) ** 2) <= fits)
    found = {
        f"data.multicrop.num_local_crops={{}} (now {num_local})": next(locals_, None),
        f"data.batch_size={{}} (now {batch})": next(batches, None),
        f"data.multicrop.local_crop_size={{}} (now {size})": next(sizes, None) if num_local else None,
    }
    return [
        text.format(value) if value is not None else f"{text.split('=')[0]} alone cannot lower it enough"
        for text, value in found.items()
    ]


@contextmanager
def out_of_memory_explained(config: Config, device: torch.device) -> Iterator[None]:
    """Out-of-memory errors of torch, DALI or CUDA inside become a ValueError that says which settings would fit."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(out_of_memory_advice(config, device)) from None


def out_of_memory_advice(config: Config, device: torch.device) -> str:
    """One line for a step that did not fit."""
    have, held = device_memory(device), held_by_others(device)
    try:
        lines = remedies(config, measure_step(config, amp_enabled(config, device)), have - held)
    except (MemoryError, RuntimeError):
        lines = ["data.multicrop.num_local_crops", "data.batch_size", "data.multicrop.local_crop_size"]
    where = f"{have / 2**30:.1f} GiB of {device}"
    if held:
        where += f", {held / 2**30:.1f} GiB of which DALI, CUDA and other processes hold"
    return (
        f"out of memory: a step does not fit the {where}. By estimate, any of these is enough: {'; '.join(lines)}. "
        "model.grad_checkpointing=true takes less memory and more time; data.prefetch=1 and smaller crops leave DALI less to hold"
    )
