"""The DALI graph: encoded images and drawn parameters in, crops out. One function serves all devices.

On the CPU one compiled operator makes all crops of the decoded image (`pipeline/crops/cpu_operator.py`), and DALI uploads them if
the model trains on a GPU. On the GPU the graph only decodes, and a kernel with the operator's arithmetic makes the crops
(`pipeline/crops/fused.py`). Where that kernel does not work, each crop is a chain of DALI's own operators, which agrees to within
rounding; the chain also runs on the CPU, so that a test compares them.
"""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipeline.crops import augment
from pipeline.crops.augment import ViewRecipe
from pipeline.crops.device import as_device_error
from pipeline.defaults import PREFETCH
from pipeline.shards.index import IMAGE
from pipeline.text import notify_after

if TYPE_CHECKING:
    from nvidia.dali.types import DataNode

DEVICES, CROP_DEVICES = ("gpu", "cpu"), ("gpu", "dali", "cpu")  # the best first
SOLARIZE_TABLE = [value if value < augment.SOLARIZE_THRESHOLD else 255 - value for value in range(256)]

# A pipeline shuts down by joining its threads, and a fork copies none: a child that collects an inherited one would wait forever.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class ReaderOptions:
    """How a graph reads and where it runs. None of this changes a crop by more than rounding.

    `device`: where the crops end up, `cpu`, or `gpu` number `device_id`. `crop_device`: where images are decoded and crops
    made: on the `gpu` by our kernel, on the device by `dali`'s operators, or on the `cpu` by the compiled operator, from where
    device gpu uploads them. `num_threads`: CPU threads of DALI. `prefetch`: batches prefetched. Raises ValueError for crops
    made on the GPU and used on the CPU.
    """

    device: str = "cpu"
    device_id: int = 0
    crop_device: str = "cpu"
    num_threads: int = 2
    prefetch: int = PREFETCH

    def numbered(self, device: str) -> str:
        """Return `cpu`, or `gpu:NUMBER`: `device` as DALI and messages name it."""
        return f"gpu:{self.device_id}" if device == "gpu" else device

    @property
    def decoder(self) -> str:
        """Where images are decoded, as DALI names it."""
        return "cpu" if self.crop_device == "cpu" else self.numbered(self.device)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.device_id) if self.device == "gpu" else torch.device("cpu")

    def __post_init__(self) -> None:
        asked = (self.device, self.crop_device)
        if self.device not in DEVICES or self.crop_device not in CROP_DEVICES or asked == ("cpu", "gpu"):
            raise ValueError(
                f"device {self.device}, crop_device {self.crop_device}: allowed are device {' and '.join(DEVICES)}, crop_device "
                f"{', '.join(CROP_DEVICES)}; crop_device gpu needs device gpu"
            )


def define_graph(
    tars: list[str], dali_indices: list[str], source: Callable[[], np.ndarray], recipes: tuple[ViewRecipe, ...],
    batch_size: int, reader: ReaderOptions, scaling: np.ndarray | None = None,
) -> Pipeline:  # fmt: skip
    """Define a graph without building it, which needs no driver. It outputs V tensors `[B, 3, size, size] uint8`; for the kernel
    (`crop_device` gpu), images `[H, W, 3] uint8` and their parameters.

    `source` is called once per batch for the parameters `[B, V, P] float32` (`augment.PARAMETERS`), and raises StopIteration at
    the end. `scaling` `[3, 2] float32`, for the compiled operator only: crops as float32, minus the offset and divided by the
    spread of each channel.
    """

    on_gpu = reader.decoder != "cpu"

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        # A file that is truncated while it is mapped kills the process.
        reading: dict[str, Any] = {"ext": [IMAGE], "missing_component_behavior": "error", "dont_use_mmap": True}
        encoded = fn.readers.webdataset(paths=tars, index_paths=dali_indices, **reading)
        # make_shards applies the EXIF orientation; boxes are drawn for the stored height and width.
        # A CPU upsamples chroma smoothly by default, and a GPU does not.
        decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        image = fn.decoders.image(parsed(encoded), device="mixed" if on_gpu else "cpu", **decoding)
        values = fn.external_source(source=source, dtype=types.FLOAT, ndim=2)
        if reader.crop_device == "gpu":
            return image, values
        if reader.crop_device == "cpu":
            crops = _compiled_crops(image, values, recipes, scaling)
            return tuple(crop.gpu() for crop in crops) if reader.device == "gpu" else tuple(crops)
        # Contrast adds this for each unit of a channel's mean. Uploaded here, once: DALI waits for every upload.
        weights = types.Constant(np.array(augment.GRAY_WEIGHTS, np.float32))
        shares = weights * (1 - values[:, augment.CONTRAST : augment.SATURATION])
        shares = shares.gpu() if on_gpu else shares
        return tuple(_dali_crop(image, values[v], shares[v], recipe) for v, recipe in enumerate(recipes))

    device_id = reader.device_id if reader.device == "gpu" else None
    return graph(batch_size=batch_size, num_threads=reader.num_threads, device_id=device_id, prefetch_queue_depth=reader.prefetch)


def build_graph(graph: Pipeline, reader: ReaderOptions) -> Pipeline:
    """Build the graph and return it. Raises DeviceError or torch.OutOfMemoryError if the device fails."""
    try:
        graph.build()
    except RuntimeError as error:
        raise as_device_error(str(error), reader.numbered(reader.device)) or error from None
    return graph


def parsed(encoded: "DataNode") -> "DataNode":
    """Return the same bytes, `[n] uint8` each, after reading every header of the batch.

    Otherwise a header that DALI's decoder cannot parse kills the process: in a batch larger than four times the threads, it
    parses some headers in the calling thread, and an exception there frees memory that other threads still use (DALI 2.4.0,
    `dali/operators/imgcodec/image_decoder.h`). Here the exception is raised safely; no byte is copied.
    """
    height = fn.peek_image_shape(encoded)[:1]
    return fn.reshape(encoded, shape=fn.cast(height * 0 - 1, dtype=types.INT32))


def _compiled_crops(
    image: "DataNode", values: "DataNode", recipes: tuple[ViewRecipe, ...], scaling: np.ndarray | None
) -> list["DataNode"]:
    is_loaded = "pipeline.crops.cpu_operator" in sys.modules
    with notify_after(3, "compiling the crops for this processor: some seconds"):
        from pipeline.crops.cpu_operator import make_crops  # here, because a GPU needs no compiler
    if not is_loaded:
        gc.collect()  # the compiler leaves cycles that refer to this call's frames, and would keep the graph alive
    return make_crops(image, values, [recipe.size for recipe in recipes], scaling)


def _dali_crop(image: "DataNode", drawn: "DataNode", shares: "DataNode", recipe: ViewRecipe) -> "DataNode":
    """Make one crop of the decoded image with DALI's operators, by its parameters `[P]` and `shares` `[3]` of `_dali_twist`.

    A conditional costs less than an identity pass over the pixels, and the graph holds none for what a recipe never does.
    """
    box = {"roi_start": drawn[augment.Y0 : augment.Y1], "roi_end": drawn[augment.Y1 : augment.FLIP]}
    crop = fn.resize(image, size=(recipe.size, recipe.size), interp_type=types.INTERP_LINEAR, antialias=True, **box)
    if recipe.jitter_prob > 0 or recipe.gray_prob > 0:
        if drawn[augment.TWIST] > 0:
            crop = _dali_twist(crop, drawn, shares)
    if recipe.blur_prob > 0:
        if drawn[augment.SIGMA] > 0:
            crop = fn.gaussian_blur(crop, sigma=drawn[augment.SIGMA])
    if recipe.solarize_prob > 0:
        if drawn[augment.SOLARIZE] > 0:
            crop = fn.lookup_table(crop, keys=list(range(256)), values=SOLARIZE_TABLE, dtype=types.UINT8)
    flip = fn.cast(drawn[augment.FLIP], dtype=types.INT32)
    return fn.crop_mirror_normalize(crop, dtype=types.UINT8, output_layout="CHW", mirror=flip)


def _dali_twist(crop: "DataNode", drawn: "DataNode", shares: "DataNode") -> "DataNode":
    """Change brightness, contrast around the mean gray of the (clipped) result, saturation and hue, as torchvision does."""
    crop = fn.brightness_contrast(crop, brightness=drawn[augment.BRIGHTNESS])
    # Named arguments must be on the CPU, so the pivot, which is computed on the device, is added: the channels' means times
    # `shares`. GPU color_space_conversion would launch one kernel for each sample.
    pivot = fn.reductions.sum(fn.reductions.mean(crop, axes=(0, 1)) * shares)
    contrast = drawn[augment.CONTRAST]
    crop = fn.brightness_contrast(crop, contrast=contrast, contrast_center=0.0, dtype=types.FLOAT) + pivot
    crop = fn.cast(crop, dtype=types.UINT8)  # saturates
    return fn.color_twist(crop, saturation=drawn[augment.SATURATION], hue=drawn[augment.HUE])
