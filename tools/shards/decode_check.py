"""Decodes images with the decoder that training uses."""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice

import numpy as np
from nvidia.dali import Pipeline, fn, types

from pipeline.crops.graph import parsed

INPUT, BATCH_IMAGES = "encoded", 32
Encoded = tuple[bytes, int, int]


def decode_errors(images: Iterable[Encoded]) -> Iterator[str]:
    """Yield for each `(content, height, width)` "" when DALI decodes it to that size, else the reason."""
    waiting = iter(images)
    while batch := list(islice(waiting, BATCH_IMAGES)):
        try:
            yield from _decode(batch)
        except RuntimeError as error:  # one bad image fails its batch and breaks the graph
            _graph.cache_clear()
            yield from (_one_line(error),) if len(batch) == 1 else (next(decode_errors([image])) for image in batch)


def _decode(batch: list[Encoded]) -> list[str]:
    graph = _graph(os.getpid())
    graph.feed_input(INPUT, [np.frombuffer(content, np.uint8) for content, _, _ in batch])
    shapes = graph.run()[0].shape()
    return [
        "" if (h, w) == (height, width) else f"DALI decodes {w}x{h}, the header says {width}x{height}"
        for (h, w, *_), (_, height, width) in zip(shapes, batch, strict=True)
    ]


@cache
def _graph(process: int) -> Pipeline:
    """Build the decoding graph once per process, because a DALI pipeline does not survive a fork."""
    graph = Pipeline(BATCH_IMAGES, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(name=INPUT, dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(parsed(encoded), device="cpu", output_type=types.RGB, adjust_orientation=False)
        graph.set_outputs(image)
    graph.build()
    return graph


def _one_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    specific = [line for line in lines if "rror" in line or "ailed" in line]
    return f"DALI cannot decode it: {(specific or lines)[-1][:200]}"
