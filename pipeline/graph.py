"""The DALI graph: encoded images and drawn parameters in, normalised crops out. One function serves both devices."""

from collections.abc import Callable

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipeline.draws import Draws, ViewRecipe

IMAGE = "img"  # the component's name in the index files that the loader writes for DALI
FLOATS = ("boxes", "colours", "sigmas")
SOLARIZE = [value if value < 128 else 255 - value for value in range(256)]  # torchvision's threshold of 128


def input_names(recipes: tuple[ViewRecipe, ...]) -> list[str]:
    """The fields of `Draws` that a graph for these recipes reads, in its order."""
    used = {
        "flips": True,
        "boxes": True,
        "twists": any(recipe.jitter_prob > 0 or recipe.gray_prob > 0 for recipe in recipes),
        "colours": any(recipe.jitter_prob > 0 or recipe.gray_prob > 0 for recipe in recipes),
        "blurs": any(recipe.blur_prob > 0 for recipe in recipes),
        "sigmas": any(recipe.blur_prob > 0 for recipe in recipes),
        "solarizes": any(recipe.solarize_prob > 0 for recipe in recipes),
    }
    return [name for name, needed in used.items() if needed]


def graph_inputs(draws: Draws, recipes: tuple[ViewRecipe, ...]) -> list[np.ndarray]:
    """The arrays that `build_graph`'s source must return for one batch."""
    arrays = (getattr(draws, name) for name in input_names(recipes))
    return [array.astype(np.int32) if array.dtype == bool else array for array in arrays]


def build_graph(
    tars: list[str],
    dali_indices: list[str],
    source: Callable[[], list[np.ndarray]],
    recipes: tuple[ViewRecipe, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: str,
    device_id: int,
    batch_size: int,
    num_threads: int,
    prefetch: int,
) -> Pipeline:
    """Build the graph on `device` (`cpu` or `gpu`). Its outputs are V tensors `[B, 3, size, size] float32`, normalised.

    `device_id` numbers the GPU. `source` is called once per batch for `graph_inputs` and raises StopIteration at the
    end. `mean` and `std` are in 0..1.
    """
    decoder = "mixed" if device == "gpu" else "cpu"
    names = input_names(recipes)
    offset, scale = [255 * value for value in mean], [255 * value for value in std]

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        encoded = fn.readers.webdataset(
            paths=tars, index_paths=dali_indices, ext=[IMAGE], missing_component_behavior="error"
        )
        # make_shards bakes the EXIF orientation in; boxes are drawn for the stored height and width.
        image = fn.decoders.image(encoded, device=decoder, output_type=types.RGB, adjust_orientation=False)
        values = fn.external_source(
            source=source,
            num_outputs=len(names),
            dtype=[types.FLOAT if name in FLOATS else types.INT32 for name in names],
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
            if recipe.jitter_prob > 0 or recipe.gray_prob > 0:
                # A conditional costs less on the CPU than an identity pass over the pixels.
                if drawn["twists"][v]:
                    crop = _colour(crop, drawn["colours"][v])
            if recipe.blur_prob > 0:
                if drawn["blurs"][v]:
                    crop = fn.gaussian_blur(crop, sigma=drawn["sigmas"][v])
            if recipe.solarize_prob > 0:
                if drawn["solarizes"][v]:
                    crop = fn.lookup_table(crop, keys=list(range(256)), values=SOLARIZE, dtype=types.UINT8)
            crops.append(
                fn.crop_mirror_normalize(
                    crop, dtype=types.FLOAT, output_layout="CHW", mirror=drawn["flips"][v], mean=offset, std=scale
                )
            )
        return tuple(crops)

    pipe = graph(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id if device == "gpu" else None,
        prefetch_queue_depth=prefetch,
    )
    pipe.build()
    return pipe


def _colour(crop: "types.DataNode", colour: "types.DataNode") -> "types.DataNode":
    """ColorJitter in the fixed order brightness, contrast, saturation, hue.

    As in torchvision, contrast pivots on the mean gray of the brightened (and clipped) crop.
    """
    crop = fn.brightness_contrast(crop, brightness=colour[0])
    gray = fn.color_space_conversion(crop, image_type=types.RGB, output_type=types.GRAY)
    crop = fn.brightness_contrast(crop, contrast=colour[1], contrast_center=fn.reductions.mean(gray))
    return fn.color_twist(crop, saturation=colour[2], hue=colour[3])
