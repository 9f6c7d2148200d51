"""A window: the batches that one DALI graph makes. A run is one window after another."""

import tempfile
import threading
from collections import deque
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from nvidia.dali import Pipeline

from pipeline.batch import CropBatch, normalize, scaling
from pipeline.dali_index import write_dali_indices
from pipeline.draws import Draws, draw
from pipeline.graph import build_graph

if TYPE_CHECKING:
    from pipeline.loader import MultiCropLoader

# A graph lists its rows in files and opens each of its tars. A data set larger than this is read by one graph after the
# other; of a small one, one graph reads many epochs.
WINDOW_ROWS, WINDOW_TARS = 50_000, 256


class GraphFailed(RuntimeError):
    """DALI's graph raised; it is of no use any more."""


class Window:
    """One DALI graph, and the global batches at `places` (epoch, position) that it makes this rank's part of."""

    def __init__(self, loader: "MultiCropLoader", epoch: int, position: int) -> None:
        self.loader = loader
        places = loader.places_from(epoch, position)
        self.places = list(islice(places, max(1, WINDOW_ROWS // loader.batch_size)))
        self.rows = self._all_rows()
        self.rows = self.rows[: self._fitting_tars()]
        self.places = self.places[: len(self.rows)]
        self.fed = self.taken = 0
        self.pending: deque[tuple[np.ndarray, int, Draws]] = deque()
        with tempfile.TemporaryDirectory(prefix="multicrop-hjepa-") as folder:
            tars, indices = write_dali_indices(loader.index, self.rows.reshape(-1), Path(folder))
            self.graph: Pipeline = build_graph(
                tars,
                indices,
                self._feed,
                loader.recipes,
                batch_size=loader.batch_size,
                compiled=loader.compiled,
                scaling=scaling(loader.mean, loader.std) if loader.normalized and loader.compiled else None,
                **loader.graph_options,
            )

    @property
    def here(self) -> tuple[int, int] | None:
        """The place of the next batch; None at the end."""
        return self.places[self.taken] if self.taken < len(self.places) else None

    @property
    def following(self) -> tuple[int, int]:
        """The place after the last."""
        return next(islice(self.loader.places_from(*self.places[-1]), 1, None))

    def rows_in_flight(self) -> np.ndarray:
        """`[n] int64`: the index rows that were fed and not yet handed out."""
        return np.concatenate([rows for rows, _, _ in self.pending])

    def _all_rows(self) -> np.ndarray:
        """`[num_batches, B] int64`: the index row of every sample; past the end of the epoch its last row is repeated."""
        loader = self.loader
        count, first = len(loader.index), loader.rank * loader.batch_size
        epochs, positions = np.array(self.places).T
        rows = np.empty((len(self.places), loader.batch_size), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            # [steps, B], the positions of this rank; the plan is asked once for all of them.
            wanted = positions[here][:, None] + first + np.arange(loader.batch_size)
            wanted = np.minimum(wanted, count - 1)
            low, high = int(wanted.min()), int(wanted.max()) + 1
            rows[here] = loader.rows_at(epoch, low, high)[wanted - low]
        return rows

    def _fitting_tars(self) -> int:
        """The number of batches, at least one, that need at most WINDOW_TARS openings of a tar."""
        shards = self.loader.index.samples["shard"][self.rows.reshape(-1)]
        openings = np.flatnonzero(np.diff(shards)) + 1
        fitting = len(shards) if len(openings) < WINDOW_TARS else openings[WINDOW_TARS - 1]
        return max(1, int(fitting) // self.loader.batch_size)

    def _feed(self) -> list[np.ndarray]:
        if self.fed == len(self.places):
            raise StopIteration
        loader, rows, (epoch, position) = self.loader, self.rows[self.fed], self.places[self.fed]
        self.fed += 1
        start, samples = position + loader.rank * loader.batch_size, loader.index.samples[rows]
        draws = draw(loader.recipes, loader.seed, epoch, start, samples["height"], samples["width"])
        self.pending.append((rows, start, draws))
        return list(draws.values)

    def next(self) -> CropBatch:
        """The next batch. Raises GraphFailed."""
        loader = self.loader
        # On a GPU the outputs are ready for the work that torch queues on its current stream.
        stream = torch.cuda.current_stream() if loader.device == "gpu" else None
        try:
            outputs = self.graph.run(stream)
        except RuntimeError as error:
            raise GraphFailed(str(error)) from None
        rows, start, draws = self.pending.popleft()
        self.taken += 1
        valid = max(0, min(len(rows), len(loader.index) - start))
        # as_tensor and DLPack share DALI's memory, which lives as long as the tensor does.
        crops = [torch.from_dlpack(output.as_tensor())[:valid] for output in outputs]
        if loader.normalized and not loader.compiled:
            crops = [normalize(crop, loader.mean, loader.std) for crop in crops]
        samples = loader.index.samples[rows[:valid]]
        sides = np.stack([samples["height"], samples["width"]] * 2, axis=1).astype(np.float32)
        parts = (
            samples["label"].astype(np.int64),
            draws.boxes[:valid] / sides[:, None],
            draws.flips[:valid],
            np.arange(start, start + valid),
        )
        return CropBatch(crops, *(torch.from_numpy(part).to(crops[0].device, non_blocking=True) for part in parts))


class Builder:
    """Builds a window in the background, while another one is in use."""

    def __init__(self, loader: "MultiCropLoader", place: tuple[int, int]) -> None:
        self._window: Window | None = None
        # A daemon: a process that ends does not wait for a window that nobody will read.
        self._thread = threading.Thread(target=self._build, args=(loader, place), daemon=True)
        self._thread.start()

    def _build(self, loader: "MultiCropLoader", place: tuple[int, int]) -> None:
        try:
            self._window = Window(loader, *place)
        except (RuntimeError, ValueError, OSError):
            self._window = None  # built again in the foreground, where the error can be told

    def result(self) -> Window | None:
        self._thread.join()
        return self._window
