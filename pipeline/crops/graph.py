"""The DALI graph: encoded images and drawn parameters in, crops out. One function serves all devices.

On the CPU every crop is one compiled operator over the decoded image (`pipeline/crops/cpu_operator.py`), and where a GPU trains
on the crops DALI uploads them; on the GPU it is a chain of DALI's own operators. Both do the same to within a rounding, and both
can run on the CPU, so that a test compares them.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipeline.crops.augment import ViewRecipe, apply_dali
from pipeline.crops.device import device_fault
from pipeline.crops.draws import FLIP, PIXEL_PARAMETERS
from pipeline.notices import notify_after
from pipeline.shards.dali_index import IMAGE

if TYPE_CHECKING:
    from nvidia.dali.types import DataNode

DEVICES = ("cpu", "gpu")

# A pipeline shuts down by joining its threads, and a fork copies none: a child that collects an inherited one waits for ever.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class ReaderOptions:
    """How a graph reads and where it runs. None of this changes a crop by more than a rounding.

    `device`: where the crops end up, `cpu`, or `gpu` number `device_id`. `crop_device`: where images are decoded and crops are
    made; `cpu` with device gpu uploads them. `num_threads`: DALI's threads on the CPU. `prefetch`: batches made ahead.
    `hw_decoder_load`: share of the JPEGs that the GPU's own engine decodes, where it has one. `use_mmap`: read shards through
    memory mappings. `compiled`: crops on the CPU by the compiled operator, or else by DALI's operators, as on the GPU.

    Raises ValueError for crops made on the GPU and used on the CPU.
    """

    device: str = "cpu"
    device_id: int = 0
    crop_device: str = "cpu"
    num_threads: int = 2
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    use_mmap: bool = True
    compiled: bool = True

    @property
    def where(self) -> str:
        """The device, for messages."""
        return f"GPU {self.device_id}" if self.device == "gpu" else "the CPU"

    @property
    def decoder(self) -> str:
        """The device that decodes, as DALI names it."""
        return f"gpu:{self.device_id}" if self.crop_device == "gpu" else "cpu"

    def __post_init__(self) -> None:
        if self.device not in DEVICES or self.crop_device not in DEVICES:
            raise ValueError(
                f"device {self.device}, crop_device {self.crop_device}: allowed are {' and '.join(DEVICES)}"
            )
        if (self.device, self.crop_device) == ("cpu", "gpu"):
            raise ValueError(
                "crop_device gpu needs device gpu: crops are not brought back from a GPU. Use crop_device cpu"
            )


def define_graph(
    tars: list[str],
    dali_indices: list[str],
    source: Callable[[], list[np.ndarray]],
    recipes: tuple[ViewRecipe, ...],
    batch_size: int,
    reader: ReaderOptions,
    scaling: np.ndarray | None = None,
) -> Pipeline:
    """A graph that is defined, and not yet built: without a driver too. Its outputs are V tensors `[B, 3, size, size] uint8`.

    `source` is called once per batch for the values of `Draws`, V arrays `[B, P] float32`, and raises StopIteration at the end.
    `scaling` `[3, 2] float32`, for the compiled operator alone: crops as float32, less the offset and divided by the spread of
    each channel.
    """
    on_gpu, views = reader.crop_device == "gpu", len(recipes)
    compiled = reader.compiled and not on_gpu
    upload = reader.device == "gpu" and not on_gpu
    feed = _stacked(source)  # outside of `graph`, whose functions DALI rewrites with all they call

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        image = _decoded(tars, dali_indices, reader)
        if compiled:
            crops = _compiled_crops(image, feed, recipes, scaling)
        else:
            values = fn.external_source(source=source, num_outputs=views, dtype=[types.FLOAT] * views, ndim=[1] * views)
            crops = _dali_crops(image, values, recipes)
        return tuple(crop.gpu() for crop in crops) if upload else tuple(crops)

    return graph(
        batch_size=batch_size,
        num_threads=reader.num_threads,
        device_id=reader.device_id if reader.device == "gpu" else None,
        prefetch_queue_depth=reader.prefetch,
    )


def _stacked(source: Callable[[], list[np.ndarray]]) -> Callable[[], np.ndarray]:
    """All views in one array `[B, V, P]`."""
    return lambda: np.stack(source(), axis=1)


def _decoded(tars: list[str], dali_indices: list[str], reader: ReaderOptions) -> "DataNode":
    on_gpu = reader.crop_device == "gpu"
    decoder = {"device": "mixed", "hw_decoder_load": reader.hw_decoder_load} if on_gpu else {"device": "cpu"}
    encoded = fn.readers.webdataset(
        paths=tars,
        index_paths=dali_indices,
        ext=[IMAGE],
        missing_component_behavior="error",
        dont_use_mmap=not reader.use_mmap,
    )
    # make_shards applies the EXIF orientation; boxes are drawn for the stored height and width.
    # Fancy upsampling of chroma is what a CPU does by default, and a GPU does not.
    return fn.decoders.image(
        parsed(encoded), output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True, **decoder
    )


def parsed(encoded: "DataNode") -> "DataNode":
    """The same bytes, `[n] uint8` each, once every header of the batch has been read.

    Without it a header that DALI's decoder cannot parse ends the process: of a batch larger than four times the threads it
    parses a part in the calling thread, and an exception there frees what the other threads still work on (DALI 2.4.0,
    `dali/operators/imgcodec/image_decoder.h`). Here the exception is raised safely; no byte is copied.
    """
    height = fn.peek_image_shape(encoded)[:1]
    return fn.reshape(encoded, shape=fn.cast(height * 0 - 1, dtype=types.INT32))


def build_graph(graph: Pipeline, reader: ReaderOptions) -> Pipeline:
    """The same graph, built. Raises DeviceError or torch.OutOfMemoryError where the device is at fault."""
    try:
        graph.build()
    except RuntimeError as error:
        raise device_fault(str(error), reader.where) or error from None
    return graph


def _compiled_crops(
    image: "DataNode", feed: Callable[[], np.ndarray], recipes: tuple[ViewRecipe, ...], scaling: np.ndarray | None
) -> list["DataNode"]:
    is_loaded = "pipeline.crops.cpu_operator" in sys.modules
    with notify_after(3, "compiling the crops for this processor: some seconds"):
        from pipeline.crops.cpu_operator import make_crops  # here, since a GPU needs no compiler
    if not is_loaded:
        gc.collect()  # the compiler leaves cycles that refer to this call's frames, and would keep the graph alive

    values = fn.external_source(source=feed, dtype=types.FLOAT, ndim=2)
    return make_crops(image, values, [recipe.size for recipe in recipes], scaling)


def _dali_crops(image: "DataNode", values: Sequence["DataNode"], recipes: tuple[ViewRecipe, ...]) -> list["DataNode"]:
    crops = []
    for v, recipe in enumerate(recipes):
        crop = fn.resize(
            image,
            size=(recipe.size, recipe.size),
            roi_start=values[v][:2],
            roi_end=values[v][2:4],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        crop = apply_dali(crop, values[v][PIXEL_PARAMETERS:], recipe)
        flip = fn.cast(values[v][FLIP], dtype=types.INT32)
        crops.append(fn.crop_mirror_normalize(crop, dtype=types.UINT8, output_layout="CHW", mirror=flip))
    return crops
