"""The DALI graph: encoded images and drawn parameters in, crops out. One function serves both devices.

On the CPU every crop is one compiled operator over the decoded image (`pipeline/crop_op.py`); on the GPU it is a chain of DALI's
own operators. Both do the same to within a rounding, and both can run on the CPU, so that a test compares them.
"""

import gc
import os
from collections.abc import Callable, Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipeline.augment import ViewRecipe, apply_dali
from pipeline.draws import FLIP, PIXEL_PARAMETERS
from pipeline.waiting import told_after

IMAGE = "img"  # the component's name in the index files that the loader writes for DALI
Nodes = Sequence["types.DataNode"]

# A pipeline shuts down by joining its threads, and a fork copies none: a child that collects an inherited one waits for ever.
os.register_at_fork(after_in_child=gc.freeze)


def build_graph(
    tars: list[str],
    dali_indices: list[str],
    source: Callable[[], list[np.ndarray]],
    recipes: tuple[ViewRecipe, ...],
    *,
    device: str,
    device_id: int,
    batch_size: int,
    num_threads: int,
    prefetch: int,
    hw_decoder_load: float,
    use_mmap: bool,
    compiled: bool,
    scaling: np.ndarray | None = None,
) -> Pipeline:
    """Build the graph on `device` (`cpu` or `gpu`). Its outputs are V tensors `[B, 3, size, size] uint8`.

    `device_id` numbers the GPU. `source` is called once per batch for the values of `Draws`, V arrays `[B, P] float32`, and
    raises StopIteration at the end. `hw_decoder_load`: share of the images that the GPU's JPEG engine decodes, where it has
    one. `use_mmap`: map the tars. `compiled` (CPU only): crops by the compiled operator instead of DALI's own; with `scaling`
    `[3, 2] float32` they are float32, less the offset and divided by the spread of each channel.
    """
    decoder = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if device == "gpu" else {"device": "cpu"}

    def feed() -> np.ndarray:
        return np.stack(source(), axis=1)  # [B, V, P]; not inside `graph`, whose functions DALI rewrites with all they call

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        encoded = fn.readers.webdataset(
            paths=tars,
            index_paths=dali_indices,
            ext=[IMAGE],
            missing_component_behavior="error",
            dont_use_mmap=not use_mmap,
        )
        # make_shards bakes the EXIF orientation in; boxes are drawn for the stored height and width.
        image = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False, **decoder)
        if compiled:
            return tuple(_compiled_crops(image, feed, recipes, scaling))
        views = len(recipes)
        values = fn.external_source(source=source, num_outputs=views, dtype=[types.FLOAT] * views, ndim=[1] * views)
        return tuple(_dali_crops(image, values, recipes))

    pipe = graph(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id if device == "gpu" else None,
        prefetch_queue_depth=prefetch,
    )
    pipe.build()
    return pipe


def _compiled_crops(
    image: "types.DataNode",
    feed: Callable[[], np.ndarray],
    recipes: tuple[ViewRecipe, ...],
    scaling: np.ndarray | None,
) -> list["types.DataNode"]:
    with told_after(3, "compiling the crops for this processor: some seconds"):
        from pipeline.crop_op import make_crops  # here, since a GPU needs no compiler

    values = fn.external_source(source=feed, dtype=types.FLOAT, ndim=2)
    return make_crops(image, values, [recipe.size for recipe in recipes], scaling)


def _dali_crops(image: "types.DataNode", values: Nodes, recipes: tuple[ViewRecipe, ...]) -> list["types.DataNode"]:
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
