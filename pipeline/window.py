"""A window: the batches that one DALI graph makes. A run is one window after another."""

import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from pipeline.crops.augment import FLIP, Y0, ViewRecipe, draw_parameters
from pipeline.crops.graph import ReaderOptions, build_graph, define_graph
from pipeline.dataset import CropBatch
from pipeline.order import BatchSequence, BatchStart
from pipeline.shards.index import ShardIndex, write_dali_indices
from pipeline.shards.watch import FolderWatch

if TYPE_CHECKING:
    from pipeline.crops.fused import FusedCrops

# A graph lists its rows in files and opens each of its tars. A larger data set is read by one graph after another; of a small
# one, a single graph reads many epochs.
WINDOW_ROWS, WINDOW_TARS = 50_000, 256

ALIGNMENT = 16  # bytes, a multiple of any item's size

Fed = tuple[np.ndarray, int, np.ndarray]  # the rows of a batch, its first position, and its parameters


class GraphFailed(RuntimeError):
    """DALI's graph raised and cannot run any more."""


class Window:
    """One DALI graph, which makes this rank's part of the global batches at `starts`, from `start` on and at most `limit`.

    `scaling`: as in `define_graph`. `fused` makes the crops of a graph that only decodes. Raises StoreError.
    """

    def __init__(
        self, sequence: BatchSequence, recipes: tuple[ViewRecipe, ...], reader: ReaderOptions, scaling: np.ndarray | None,
        fused: "FusedCrops | None", watch: FolderWatch, start: BatchStart, limit: int | None = None,
    ) -> None:  # fmt: skip
        self.sequence, self.reader, self._fused = sequence, reader, fused
        starts, rows = plan_window(sequence, start, limit)
        self.starts, self.taken, self.shards = starts, 0, sequence.index.samples["shard"][rows]
        watch.patiently(lambda: watch.check(self.shards))
        self.fed: deque[Fed] = deque()
        batches = feed(sequence, recipes, self.starts, rows, self.fed)
        with tempfile.TemporaryDirectory(prefix="multicrop-hjepa-", ignore_cleanup_errors=True) as folder:
            tars, indices = write_dali_indices(sequence.index, rows.reshape(-1), Path(folder))
            graph = define_graph(tars, indices, lambda: next(batches), recipes, sequence.batch_size, reader, scaling)
            self.graph = build_graph(graph, reader)

    @property
    def left(self) -> int:
        """The number of batches that it can still make."""
        return len(self.starts) - self.taken

    @property
    def here(self) -> BatchStart | None:
        """Where the next batch begins; None at the end."""
        return self.starts[self.taken] if self.left else None

    @property
    def following(self) -> BatchStart:
        """Where the first batch after this window begins."""
        return next(islice(self.sequence.iter_batch_starts(self.starts[-1]), 1, None))

    def next(self) -> CropBatch:
        """Make the next batch, with uint8 crops unless the graph scales them. Raises GraphFailed."""
        # On a GPU the outputs are ready for the work that torch queues on its current stream.
        stream = torch.cuda.current_stream(self.reader.device_id) if self.reader.device == "gpu" else None
        try:
            outputs = self.graph.run(stream)
        except RuntimeError as error:
            raise GraphFailed(str(error)) from None
        self.taken += 1
        return make_batch(self.sequence.index, self.fed.popleft(), outputs, self._fused, self.reader.torch_device)


def make_batch(
    index: ShardIndex, fed: Fed, outputs: Sequence[Any], fused: "FusedCrops | None", device: torch.device
) -> CropBatch:
    """Return the batch that was `fed` to a graph, from the graph's outputs, without waiting for the device."""
    rows, first, parameters = fed
    # DALI's batches are all of one size; the last one of an epoch without `drop_last` is cut.
    valid = max(0, min(len(rows), len(index) - first))
    samples, drawn = index.samples[rows[:valid]], parameters[:valid]
    sides = np.stack([samples["height"], samples["width"]] * 2, axis=1).astype(np.float32)
    boxes, flips = drawn[..., Y0:FLIP] / sides[:, None], drawn[..., FLIP] != 0
    parts = [samples["label"].astype(np.int64), boxes, flips, np.arange(first, first + valid)]
    if fused is None:
        crops, tensors = [as_torch(output) for output in outputs], upload(parts, device)
    else:
        images = outputs[0]
        addresses, shapes = [images[i].data_ptr() for i in range(len(images))], images.shape()
        kernel_rows, rooms = fused.prepare(addresses, np.array([shape[:2] for shape in shapes]), parameters)
        tensors = upload([*parts, *kernel_rows], device)
        crops = fused.make(tensors[len(parts) :], rooms, images)
    return CropBatch([crop[:valid] for crop in crops], *tensors[: len(parts)])


def plan_window(sequence: BatchSequence, start: BatchStart, limit: int | None) -> tuple[list[BatchStart], np.ndarray]:
    """Return the starts of the next n global batches and their rows, `[n, B] int64`: as many as one graph can read."""
    max_batches, shard_of = max(1, WINDOW_ROWS // sequence.batch_size), sequence.index.samples["shard"]
    ahead = islice(sequence.iter_batch_starts(start), max_batches if limit is None else min(max_batches, limit))
    starts, parts, num_opened = list[BatchStart](), list[np.ndarray](), 0
    # Epoch by epoch: a small data set runs out of tars long before it runs out of rows.
    for _, in_epoch in groupby(ahead, key=lambda batch: batch.epoch):
        starts += (batch_starts := list(in_epoch))
        parts.append(sequence.rank_rows(batch_starts))
        num_opened += 1 + int(np.count_nonzero(np.diff(shard_of[parts[-1].reshape(-1)])))
        if num_opened > WINDOW_TARS:
            break
    rows = np.concatenate(parts)
    openings = np.flatnonzero(np.diff(shard_of[rows.reshape(-1)])) + 1
    fitting = rows.size if len(openings) < WINDOW_TARS else int(openings[WINDOW_TARS - 1])
    count = max(1, fitting // sequence.batch_size)
    return starts[:count], rows[:count]


def feed(
    sequence: BatchSequence, recipes: tuple[ViewRecipe, ...], starts: list[BatchStart], rows: np.ndarray, fed: deque[Fed]
) -> Iterator[np.ndarray]:
    """Yield the parameters `[B, V, P]` of each batch, noting the batch in `fed`. DALI takes them as it prefetches.

    A function that knows nothing of the window: without a reference cycle an unused graph is freed at once, with its threads.
    """
    for start, batch_rows in zip(starts, rows, strict=True):
        first, samples = sequence.rank_start(start), sequence.index.samples[batch_rows]
        seed, sides = sequence.plan.seed, (samples["height"], samples["width"])
        drawn = np.ascontiguousarray(draw_parameters(recipes, seed, start.epoch, first, *sides).swapaxes(0, 1))
        fed.append((batch_rows, first, drawn))
        yield drawn


def as_torch(output: TensorListCPU | TensorListGPU) -> torch.Tensor:
    """Return DALI's memory as a tensor, which keeps it alive."""
    # On a GPU, `run` has made torch's stream wait for this batch, so that the capsule need not (-1). A capsule for a stream, or a
    # copy to torch's memory, would also wait for the prefetched batches, and DALI after the copy for the training step before it.
    return torch.from_dlpack(output.as_tensor().__dlpack__(stream=-1))  # type: ignore[union-attr]


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy the arrays to `device` in one transfer, for which neither the host nor the device waits."""
    starts = [0, *accumulate(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]
    memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = [slice(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=False)]
    for place, array in zip(places, arrays, strict=True):
        memory.numpy()[place] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there, kinds = memory.to(device, non_blocking=True), [torch.from_numpy(array).dtype for array in arrays]
    return [there[place].view(kind).view(array.shape) for place, kind, array in zip(places, kinds, arrays, strict=True)]


class WindowBuilder(threading.Thread):
    """Builds `window` in the background while another one is in use. `window` is valid after `join`.

    After an error it is None: the window is built again in the foreground, where the error can be reported.
    """

    window: Window | None = None

    def __init__(self, make: Callable[[], Window]) -> None:
        # A daemon: a process that ends does not wait for a window that nobody will read, as it would for an executor.
        super().__init__(daemon=True)
        self._make = make
        self.start()

    def run(self) -> None:
        with suppress(RuntimeError, ValueError, OSError):
            self.window = self._make()
