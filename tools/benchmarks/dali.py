"""The rows of `bench.py pipeline` that run on DALI: ours, a hand-written pipeline, and reading and decoding alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.crops.augment import ViewRecipe
from tools.benchmarks.measure import Setup

EXTENSIONS = "jpg;jpeg;png;JPEG;JPG;PNG"


def ours(setup: Setup, **options: Any) -> Iterator[Sequence[torch.Tensor]]:
    """This project's loader with its default recipe; `options` of `build_multicrop_dataloader`."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    loader = build_multicrop_dataloader(
        dataset, setup.batch_size, device=setup.device, num_workers=setup.threads, prefetch=2, **options
    )
    while True:
        for batch in loader:
            yield batch.crops


def dali_native(setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    """The same recipe as a DALI user writes it: DALI draws, and DALI's fused colour operator does all of the jitter."""
    dataset = build_multicrop_dataset("custom", setup.folder)
    offset, scale = [255 * value for value in dataset.mean], [255 * value for value in dataset.std]

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        image = _decoded(setup)
        return tuple(_native_crop(image, recipe, offset, scale) for recipe in dataset.recipes)

    yield from _run(graph(**_options(setup)), setup)


def decode_only(setup: Setup) -> Iterator[Sequence[Any]]:
    """DALI's reader and decoder and nothing after them."""

    @pipeline_def
    def graph() -> Any:
        return _decoded(setup)

    pipe = graph(**_options(setup))
    while True:
        yield pipe.run()


def _run(pipe: Pipeline, setup: Setup) -> Iterator[Sequence[torch.Tensor]]:
    while True:
        outputs = pipe.run(torch.cuda.current_stream() if setup.device == "gpu" else None)
        yield [torch.from_dlpack(output.as_tensor()) for output in outputs]


def _options(setup: Setup) -> dict[str, Any]:
    return {
        "batch_size": setup.batch_size,
        "num_threads": setup.threads,
        "device_id": 0 if setup.device == "gpu" else None,
        "prefetch_queue_depth": 2,
        "seed": 1,
    }


def _decoded(setup: Setup) -> "types.DataNode":
    tars = sorted(setup.folder.glob("*.tar"))
    indices = [path.with_suffix(".idx") for path in tars]
    encoded = fn.readers.webdataset(
        paths=[str(path) for path in tars],
        index_paths=[str(path) for path in indices] if all(path.exists() for path in indices) else None,
        ext=[EXTENSIONS],
        random_shuffle=True,
        name="reader",
    )
    return fn.decoders.image(encoded, device="mixed" if setup.device == "gpu" else "cpu", output_type=types.RGB)


def _native_crop(
    image: "types.DataNode", recipe: ViewRecipe, offset: list[float], scale: list[float]
) -> "types.DataNode":
    crop = fn.random_resized_crop(
        image,
        size=(recipe.size, recipe.size),
        random_area=recipe.scale,
        random_aspect_ratio=recipe.ratio,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    jitter, gray = _coin(recipe.jitter_prob), _coin(recipe.gray_prob)
    if jitter or gray:
        # One pass for both: no jitter is a factor of 1, gray a saturation of 0.
        crop = fn.color_twist(
            crop,
            brightness=1 + jitter * _uniform(-recipe.brightness, recipe.brightness),
            contrast=1 + jitter * _uniform(-recipe.contrast, recipe.contrast),
            saturation=(1 - gray) * (1 + jitter * _uniform(-recipe.saturation, recipe.saturation)),
            hue=jitter * _uniform(-360 * recipe.hue, 360 * recipe.hue),
        )
    crop = _blur(crop, recipe) if recipe.blur_prob > 0 else crop
    crop = _solarize(crop, recipe) if recipe.solarize_prob > 0 else crop
    flip = fn.random.coin_flip(probability=recipe.flip_prob)  # the operator takes an int32
    return fn.crop_mirror_normalize(crop, dtype=types.FLOAT, output_layout="CHW", mirror=flip, mean=offset, std=scale)


def _blur(crop: "types.DataNode", recipe: ViewRecipe) -> "types.DataNode":
    if _coin(recipe.blur_prob):
        crop = fn.gaussian_blur(crop, sigma=_uniform(*recipe.blur_sigma))
    return crop


def _solarize(crop: "types.DataNode", recipe: ViewRecipe) -> "types.DataNode":
    if _coin(recipe.solarize_prob):
        table = [value if value < 128 else 255 - value for value in range(256)]
        crop = fn.lookup_table(crop, keys=list(range(256)), values=table, dtype=types.UINT8)
    return crop


def _coin(probability: float) -> "types.DataNode":
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _uniform(low: float, high: float) -> "types.DataNode":
    return fn.random.uniform(range=(low, high))
