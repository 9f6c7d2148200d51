"""The DALI graph: encoded images and drawn parameters in, crops out. One function serves both devices.

On the CPU every crop is one compiled operator over the decoded image (`pipeline/kernels.py`); on the GPU it is a chain of DALI's
own operators. Both do the same to within a rounding, and both can run on the CPU, so that a test compares them.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipeline.draws import Draws, ViewRecipe

IMAGE = "img"  # the component's name in the index files that the loader writes for DALI
SOLARIZE = [value if value < 128 else 255 - value for value in range(256)]  # torchvision's threshold of 128


def graph_inputs(draws: Draws, recipes: tuple[ViewRecipe, ...], compiled: bool) -> list[np.ndarray]:
    """The arrays that `build_graph`'s source must return for one batch.

    Compiled: for every view `[B, 12] float32`, in the order of `kernels.PARAMETERS`. Else those fields of `Draws` that the
    recipes need, `[B, V, ...]`, bools as int32.
    """
    if not compiled:
        arrays = (getattr(draws, name) for name in _field_names(recipes))
        return [array.astype(np.int32) if array.dtype == bool else array for array in arrays]
    columns = (
        draws.boxes,
        draws.flips[..., None],
        draws.twists[..., None],
        draws.colours,
        np.where(draws.blurs, draws.sigmas, 0)[..., None],
        draws.solarizes[..., None],
    )
    values = np.concatenate(columns, axis=2, dtype=np.float32)
    return list(np.ascontiguousarray(values.swapaxes(0, 1)))


def _field_names(recipes: tuple[ViewRecipe, ...]) -> list[str]:
    """The fields of `Draws` that DALI's own operators need for these recipes, in its order."""
    colours = any(recipe.jitter_prob > 0 or recipe.gray_prob > 0 for recipe in recipes)
    blurs = any(recipe.blur_prob > 0 for recipe in recipes)
    used = {
        "boxes": True,
        "flips": True,
        "twists": colours,
        "colours": colours,
        "blurs": blurs,
        "sigmas": blurs,
        "solarizes": any(recipe.solarize_prob > 0 for recipe in recipes),
    }
    return [name for name, needed in used.items() if needed]


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
) -> Pipeline:
    """Build the graph on `device` (`cpu` or `gpu`). Its outputs are V tensors `[B, 3, size, size] uint8`.

    `device_id` numbers the GPU. `source` is called once per batch for `graph_inputs` and raises StopIteration at the
    end. `hw_decoder_load`: share of the images that the GPU's JPEG engine decodes, where it has one. `use_mmap`: map the
    tars. `compiled` (CPU only): crops by the compiled operator instead of DALI's own.
    """
    decoder = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if device == "gpu" else {"device": "cpu"}

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
        return tuple((_compiled_crops if compiled else _dali_crops)(image, source, recipes))

    pipe = graph(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id if device == "gpu" else None,
        prefetch_queue_depth=prefetch,
    )
    pipe.build()
    return pipe


def _compiled_crops(
    image: "types.DataNode", source: Callable[[], list[np.ndarray]], recipes: tuple[ViewRecipe, ...]
) -> list["types.DataNode"]:
    with _told_if_slow():
        from pipeline.crop_op import MakeCrop  # here, since a GPU needs no compiler

    make_crop, views = MakeCrop(), len(recipes)
    values = fn.external_source(source=source, num_outputs=views, dtype=[types.FLOAT] * views, ndim=[1] * views)
    rulers = {recipe.size: types.Constant(np.zeros(recipe.size, np.uint8)) for recipe in recipes}
    return [make_crop(image, values[v], rulers[recipe.size]) for v, recipe in enumerate(recipes)]


@contextmanager
def _told_if_slow() -> Iterator[None]:
    """Say so when the machine code of the crops is not at hand: no silent wait."""
    text = "compiling the crops for this processor: some seconds"
    timer = threading.Timer(3.0, print, [text], {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _dali_crops(
    image: "types.DataNode", source: Callable[[], list[np.ndarray]], recipes: tuple[ViewRecipe, ...]
) -> list["types.DataNode"]:
    names = _field_names(recipes)
    values = fn.external_source(
        source=source,
        num_outputs=len(names),
        dtype=[types.FLOAT if name in ("boxes", "colours", "sigmas") else types.INT32 for name in names],
        ndim=[2 if name in ("boxes", "colours") else 1 for name in names],
    )
    drawn = {name: values[i] for i, name in enumerate(names)}
    crops = []
    for v, recipe in enumerate(recipes):
        crop = fn.resize(
            image,
            size=(recipe.size, recipe.size),
            roi_start=drawn["boxes"][v, :2],
            roi_end=drawn["boxes"][v, 2:],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        # A conditional costs less than an identity pass over the pixels.
        if recipe.jitter_prob > 0 or recipe.gray_prob > 0:
            if drawn["twists"][v]:
                crop = _colour(crop, drawn["colours"][v])
        if recipe.blur_prob > 0:
            if drawn["blurs"][v]:
                crop = fn.gaussian_blur(crop, sigma=drawn["sigmas"][v])
        if recipe.solarize_prob > 0:
            if drawn["solarizes"][v]:
                crop = fn.lookup_table(crop, keys=list(range(256)), values=SOLARIZE, dtype=types.UINT8)
        crops.append(fn.crop_mirror_normalize(crop, dtype=types.UINT8, output_layout="CHW", mirror=drawn["flips"][v]))
    return crops


def _colour(crop: "types.DataNode", colour: "types.DataNode") -> "types.DataNode":
    """ColorJitter in the fixed order brightness, contrast, saturation, hue.

    As in torchvision, contrast pivots on the mean gray of the brightened (and clipped) crop.
    """
    crop = fn.brightness_contrast(crop, brightness=colour[0])
    gray = fn.color_space_conversion(crop, image_type=types.RGB, output_type=types.GRAY)
    crop = fn.brightness_contrast(crop, contrast=colour[1], contrast_center=fn.reductions.mean(gray))
    return fn.color_twist(crop, saturation=colour[2], hue=colour[3])
