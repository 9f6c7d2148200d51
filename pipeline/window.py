"""A window: the batches that one DALI graph makes. A run is one window after another."""

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from pipeline.batch import CropBatch
from pipeline.crops.augment import ViewRecipe
from pipeline.crops.draws import Draws, draw
from pipeline.crops.graph import ReaderOptions, build_graph, define_graph
from pipeline.sequence import BatchSequence, Place
from pipeline.shards.cache import Pins
from pipeline.shards.dali_index import write_dali_indices
from pipeline.shards.fetcher import ShardFetcher

# A graph lists its rows in files and opens each of its tars. A data set larger than this is read by one graph after the
# other; of a small one, one graph reads many epochs.
WINDOW_ROWS, WINDOW_TARS = 50_000, 256


class GraphFailed(RuntimeError):
    """DALI's graph raised and cannot run any more."""


class Feeder:
    """DALI's source of drawn parameters, called once per batch.

    It does not refer to its graph: without a reference cycle an unused graph is freed at once, with its threads and memory.
    `places`: of the global batches; `rows`: `[len(places), B]`, this rank's index rows of each. Of shards in a store they go as
    far as these are here already.
    """

    def __init__(
        self, sequence: BatchSequence, recipes: tuple[ViewRecipe, ...], place: Place, fetcher: ShardFetcher | None
    ) -> None:
        self.sequence, self.recipes = sequence, recipes
        places = list(islice(sequence.places_from(*place), max(1, WINDOW_ROWS // sequence.batch_size)))
        rows = sequence.own_rows(places)
        self.shards = sequence.index.samples["shard"][rows]
        count = fitting_batches(self.shards)
        if fetcher is not None:
            count = fetcher.ready_batches(self.shards[:count])
        self.rows, self.shards = rows[:count], self.shards[:count]
        self.places = places[: len(self.rows)]
        self.fed = 0
        self.pending: deque[tuple[np.ndarray, int, Draws]] = deque()

    def __call__(self) -> list[np.ndarray]:
        if self.fed == len(self.places):
            raise StopIteration
        rows, place = self.rows[self.fed], self.places[self.fed]
        self.fed += 1
        start, samples = self.sequence.own_start(place), self.sequence.index.samples[rows]
        draws = draw(self.recipes, self.sequence.plan.seed, place[0], start, samples["height"], samples["width"])
        self.pending.append((rows, start, draws))
        return list(draws.values)


class Window:
    """One DALI graph, and the global batches at `places` of which it makes this rank's part. `place` is the first.

    `scaling`: as in `define_graph`. `waited`: from when to when it waited for the store, of `time.perf_counter`.

    Raises StoreError.
    """

    def __init__(
        self,
        sequence: BatchSequence,
        recipes: tuple[ViewRecipe, ...],
        reader: ReaderOptions,
        scaling: np.ndarray | None,
        fetcher: ShardFetcher | None,
        place: Place,
    ) -> None:
        self.sequence, self.reader = sequence, reader
        feeder = self.feeder = Feeder(sequence, recipes, place, fetcher)
        self.places, self.taken = feeder.places, 0
        self.waited = (0.0, 0.0)
        self.pins: Pins | None = None
        if fetcher is not None:
            began = time.perf_counter()
            self.pins = fetcher.wait_for(np.unique(feeder.shards).tolist())
            self.waited = (began, time.perf_counter())
            fetcher.prefetch(sequence.shards_from(*self.following))
        with tempfile.TemporaryDirectory(prefix="multicrop-hjepa-", ignore_cleanup_errors=True) as folder:
            tars, indices = write_dali_indices(sequence.index, feeder.rows.reshape(-1), Path(folder), self.pins)
            graph = define_graph(tars, indices, feeder, recipes, sequence.batch_size, reader, scaling)
            self.graph = build_graph(graph, reader)

    @property
    def here(self) -> Place | None:
        """The place of the next batch; None at the end."""
        return self.places[self.taken] if self.taken < len(self.places) else None

    @property
    def following(self) -> Place:
        """The place after the last."""
        return next(islice(self.sequence.places_from(*self.places[-1]), 1, None))

    def rows_in_flight(self) -> np.ndarray:
        """`[n] int64`: the index rows that were fed and not yet handed out."""
        return np.concatenate([rows for rows, _, _ in self.feeder.pending])

    def next(self) -> CropBatch:
        """The next batch, its crops as uint8 unless the graph scales them. Raises GraphFailed."""
        # On a GPU the outputs are ready for the work that torch queues on its current stream.
        stream = torch.cuda.current_stream(self.reader.device_id) if self.reader.device == "gpu" else None
        try:
            outputs = self.graph.run(stream)
        except RuntimeError as error:
            raise GraphFailed(str(error)) from None
        rows, start, draws = self.feeder.pending.popleft()
        self.taken += 1
        valid = max(0, min(len(rows), len(self.sequence.index) - start))
        crops = [as_torch(output)[:valid] for output in outputs]
        samples = self.sequence.index.samples[rows[:valid]]
        sides = np.stack([samples["height"], samples["width"]] * 2, axis=1).astype(np.float32)
        parts = (
            samples["label"].astype(np.int64),
            draws.boxes[:valid] / sides[:, None],
            draws.flips[:valid],
            np.arange(start, start + valid),
        )
        return CropBatch(crops, *(torch.from_numpy(part).to(crops[0].device, non_blocking=True) for part in parts))


def as_torch(output: TensorListCPU | TensorListGPU) -> torch.Tensor:
    """DALI's memory as a tensor, which keeps it alive."""
    # On a GPU, `run` has made torch's stream wait for this batch, so that the capsule need not (-1). A capsule for a stream, or a
    # copy to torch's memory, would wait for the batches made ahead too, and DALI after the copy for the training step before it.
    return torch.from_dlpack(output.as_tensor().__dlpack__(stream=-1))  # type: ignore[union-attr]


def fitting_batches(shards: np.ndarray) -> int:
    """How many of the batches, at least one, need at most WINDOW_TARS openings of a tar. `shards`: `[n, B]`, of each sample."""
    openings = np.flatnonzero(np.diff(shards.reshape(-1))) + 1
    fitting = shards.size if len(openings) < WINDOW_TARS else int(openings[WINDOW_TARS - 1])
    return max(1, fitting // shards.shape[1])


class Builder:
    """Builds a window in the background, while another one is in use."""

    def __init__(self, make: Callable[[Place], Window], place: Place) -> None:
        self._window: Window | None = None
        # A daemon: a process that ends does not wait for a window that nobody will read.
        self._thread = threading.Thread(target=self._build, args=(make, place), daemon=True)
        self._thread.start()

    def _build(self, make: Callable[[Place], Window], place: Place) -> None:
        try:
            self._window = make(place)
        except (RuntimeError, ValueError, OSError):
            self._window = None  # built again in the foreground, where the error can be reported

    def result(self) -> Window | None:
        self._thread.join()
        return self._window
