"""The loader: an exact, resumable stream of `CropBatch` made by DALI."""

import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline

from pipeline.batch import CropBatch
from pipeline.dali_index import write_dali_indices
from pipeline.draws import Draws, ViewRecipe, draw
from pipeline.graph import build_graph, graph_inputs
from pipeline.index import ShardIndex
from pipeline.plan import Plan

# A graph lists the rows of as many whole epochs as fit in this, so that a small data set does not open a reader per epoch.
WINDOW_ROWS = 10_000


class MultiCropLoader:
    """Iterates the rest of the current epoch: `for crops, labels in loader`. The next iteration is the next epoch.

    Global batch k of an epoch holds the positions `k * G .. (k + 1) * G` with `G = batch_size * world_size`; this rank yields
    its slice. Every rank takes the same number of steps. With `drop_last` the `N mod G` positions at the end of an epoch are
    left out (other samples in each epoch), without it the last batch is shorter.

    Raises ValueError for a data set smaller than one global batch, and for a sample that cannot be decoded.
    """

    def __init__(
        self,
        index: ShardIndex,
        recipes: tuple[ViewRecipe, ...],
        batch_size: int,
        *,
        seed: int = 0,
        device: str = "cpu",
        device_id: int = 0,
        num_threads: int = 2,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if device == "gpu" and not torch.cuda.is_available():
            raise ValueError("device gpu: torch sees no CUDA GPU. Use device cpu, or check the driver with nvidia-smi")
        self.index, self.recipes, self.batch_size = index, recipes, batch_size
        self.seed, self.device, self.device_id = seed, device, device_id
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.plan = Plan(index.sizes(), seed, shuffle)
        self.global_batch = batch_size * world_size
        if drop_last and len(index) < self.global_batch:
            raise ValueError(
                f"{index.folder}: {len(index)} samples are fewer than one global batch of {self.global_batch} "
                f"(batch_size {batch_size} x {world_size} ranks). Lower data.batch_size"
            )
        self._graph_options = {"num_threads": num_threads, "prefetch": prefetch, "mean": mean, "std": std}
        self._epoch = self._position = 0
        self._stream: tuple[tuple[int, int], _Stream] | None = None  # the (epoch, position) it will yield next

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self._steps(0)

    def _steps(self, position: int) -> int:
        rest = len(self.index) - position
        return rest // self.global_batch if self.drop_last else -(-rest // self.global_batch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, unless the loader already stands inside it."""
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: `epoch` and the `position` inside it, over all ranks."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict()` of a loader of any batch size and world size."""
        if not 0 <= state["position"] <= len(self.index):
            raise ValueError(
                f"{self.index.folder}: position {state['position']} lies outside its {len(self.index)} samples: "
                "the state belongs to another data set"
            )
        self._epoch, self._position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[CropBatch]:
        epoch = self._epoch
        for _ in range(self._steps(self._position)):
            batch = self._next_batch()
            # Moved on before the yield: a state saved while the batch is in use names the batch after it.
            self._position += self.global_batch
            yield batch
        if self._epoch == epoch:
            self._epoch, self._position = epoch + 1, 0

    def _next_batch(self) -> CropBatch:
        here = (self._epoch, self._position)
        if self._stream is None or self._stream[0] != here or self._stream[1].remaining == 0:
            self._stream = None  # free the old graph before the new one is built
            self._stream = (here, _Stream(self, *here, self._graph_options))
        stream = self._stream[1]
        batch = stream.next()
        position = self._position + self.global_batch
        last = self._steps(position) == 0
        self._stream = ((self._epoch + 1, 0) if last else (self._epoch, position), stream)
        return batch

    def batches_from(self, epoch: int, position: int) -> Iterator[tuple[int, int]]:
        """The (epoch, first position) of this rank's batches from there on, up to the end of one graph's window."""
        rows = 0
        while rows == 0 or rows + len(self.index) <= WINDOW_ROWS:
            steps = self._steps(position)
            starts = position + np.arange(steps) * self.global_batch + self.rank * self.batch_size
            yield from ((epoch, int(start)) for start in starts)
            rows += len(self.index)
            epoch, position = epoch + 1, 0


class _Stream:
    """One DALI graph and the batches it was built for."""

    def __init__(self, loader: MultiCropLoader, epoch: int, position: int, options: dict) -> None:
        self.loader = loader
        self.batches = list(loader.batches_from(epoch, position))
        self.remaining = len(self.batches)
        self.rows = self._all_rows()
        self.fed = 0
        self.pending: deque[tuple[np.ndarray, int, Draws]] = deque()
        with tempfile.TemporaryDirectory(prefix="multicrop-hjepa-") as folder:
            tars, indices = write_dali_indices(loader.index, self.rows.reshape(-1), Path(folder))
            self.graph: Pipeline = build_graph(
                tars,
                indices,
                self._feed,
                loader.recipes,
                device=loader.device,
                device_id=loader.device_id,
                batch_size=loader.batch_size,
                **options,
            )

    def _all_rows(self) -> np.ndarray:
        """`[num_batches, B] int64`: the index row of every sample; past the end of the epoch its last row is repeated."""
        size, count = self.loader.batch_size, len(self.loader.index)
        rows = np.empty((len(self.batches), size), np.int64)
        orders: dict[int, np.ndarray] = {}
        for k, (epoch, start) in enumerate(self.batches):
            if epoch not in orders:
                orders = {epoch: self.loader.plan.rows(epoch, 0, count)}
            rows[k] = orders[epoch][np.minimum(np.arange(start, start + size), count - 1)]
        return rows

    def _feed(self) -> list[np.ndarray]:
        if self.fed == len(self.batches):
            raise StopIteration
        (epoch, start), rows = self.batches[self.fed], self.rows[self.fed]
        self.fed += 1
        loader, samples = self.loader, self.loader.index.samples[rows]
        draws = draw(loader.recipes, loader.seed, epoch, start, samples["height"], samples["width"])
        self.pending.append((rows, start, draws))
        return graph_inputs(draws, loader.recipes)

    def next(self) -> CropBatch:
        try:
            # On a GPU the outputs are ready for the work that torch queues on its current stream.
            stream = torch.cuda.current_stream() if self.loader.device == "gpu" else None
            outputs = self.graph.run(stream)
        except RuntimeError as error:
            raise ValueError(self._blame(str(error))) from None
        self.remaining -= 1
        rows, start, draws = self.pending.popleft()
        valid = min(len(rows), len(self.loader.index) - start)
        # as_tensor and DLPack share DALI's memory, which lives as long as the tensor does.
        crops = [torch.from_dlpack(output.as_tensor())[:valid] for output in outputs]
        samples = self.loader.index.samples[rows[:valid]]
        sides = np.stack([samples["height"], samples["width"]] * 2, axis=1).astype(np.float32)
        parts = (
            samples["label"].astype(np.int64),
            draws.boxes[:valid] / sides[:, None],
            draws.flips[:valid],
            np.arange(start, start + valid),
        )
        return CropBatch(crops, *(torch.from_numpy(part).to(crops[0].device, non_blocking=True) for part in parts))

    def _blame(self, message: str) -> str:
        """DALI's error as one line. It does not say which sample it was, so the batches in flight are decoded once more."""
        index = self.loader.index
        rows = np.concatenate([rows for rows, _, _ in self.pending])
        bad = [index.describe(row) for row in rows if not index.decodes(row)]
        if bad:
            return (
                f"cannot decode {'; '.join(bad)}. Find every damaged sample with `python tools/make_shards.py verify`"
            )
        reason = message.split("encountered:")[-1].strip().splitlines()[0]
        return f"{index.folder}: DALI failed on one of {len(rows)} samples: {reason}"
