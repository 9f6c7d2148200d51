"""Decode images with the decoder that training uses."""

import os
from functools import cache

import numpy as np
from nvidia.dali import Pipeline, fn, types

from pipeline.crops.graph import parsed

BATCH = 32
INPUT = "encoded"
Encoded = tuple[bytes, int, int]


def decode_errors(images: list[Encoded]) -> list[str]:
    """For each `(content, height, width)`: "" when DALI decodes it to that size, else the reason."""
    errors: list[str] = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        try:
            errors += _decode(batch)
        except RuntimeError as error:  # one bad image fails its whole batch and breaks the pipeline
            _graph.cache_clear()
            errors += [_one_line(error)] if len(batch) == 1 else [decode_errors([image])[0] for image in batch]
    return errors


def _decode(batch: list[Encoded]) -> list[str]:
    graph = _graph(os.getpid())
    graph.feed_input(INPUT, [np.frombuffer(content, np.uint8) for content, _, _ in batch])
    shapes = graph.run()[0].shape()
    return [
        ""
        if (shape[0], shape[1]) == (height, width)
        else f"DALI decodes {shape[1]}x{shape[0]}, the header says {width}x{height}"
        for shape, (_, height, width) in zip(shapes, batch, strict=True)
    ]


@cache
def _graph(process: int) -> Pipeline:
    """One for each process: a DALI pipeline does not survive a fork."""
    graph = Pipeline(BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(name=INPUT, dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(parsed(encoded), device="cpu", output_type=types.RGB, adjust_orientation=False)
        graph.set_outputs(image)
    graph.build()
    return graph


def _one_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    specific = [line for line in lines if "Error" in line or "error" in line or "ailed" in line]
    return f"DALI cannot decode it: {(specific or lines)[-1][:200]}"
