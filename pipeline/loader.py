"""The loader: an exact, resumable stream of `CropBatch` made by DALI."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.batch import CropBatch
from pipeline.crops.augment import ViewRecipe
from pipeline.plan import Plan
from pipeline.quarantine import Quarantine, find_faults
from pipeline.shards.index import ShardIndex
from pipeline.shards.storage import allow_open_files
from pipeline.window import WINDOW_TARS, Builder, GraphFailed, Window

OPEN_WINDOWS = 6  # of a run: one in use and one built ahead, for training and the two splits of the evaluation


class MultiCropLoader:
    """Iterates the rest of the current epoch: `for crops, labels in loader`. The next iteration is the next epoch.

    Global batch k of an epoch holds the positions `k * G .. (k + 1) * G` with `G = batch_size * world_size`; this rank yields
    its slice. Every rank takes the same number of steps. With `drop_last` the `N mod G` positions at the end of an epoch are
    left out (other samples in each epoch), without it the last batch is shorter.

    `normalized=False` yields crops as uint8, for a model that normalises them itself: a quarter of the memory to move. A sample
    that cannot be decoded goes into `quarantine` and another one stands in for it, at this position alone. `compiled` chooses
    the CPU's compiled operator (None: on the CPU).

    Raises ValueError for a data set smaller than one global batch, and when the quarantine is full.
    """

    def __init__(
        self,
        index: ShardIndex,
        recipes: tuple[ViewRecipe, ...],
        batch_size: int,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int = 0,
        device: str = "cpu",
        device_id: int = 0,
        num_threads: int = 2,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        use_mmap: bool = True,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        normalized: bool = True,
        quarantine: Quarantine | None = None,
        compiled: bool | None = None,
    ) -> None:
        if device == "gpu" and not torch.cuda.is_available():
            raise ValueError("device gpu: torch sees no CUDA GPU. Use device cpu, or check the driver with nvidia-smi")
        self.index, self.recipes, self.batch_size = index, recipes, batch_size
        self.seed, self.device = seed, device
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.mean, self.std, self.normalized = mean, std, normalized
        self.plan = Plan(index.sizes(), seed, shuffle)
        self.quarantine = Quarantine(index) if quarantine is None else quarantine
        self.global_batch = batch_size * world_size
        if drop_last and len(index) < self.global_batch:
            raise ValueError(
                f"{index.folder}: {len(index)} samples are fewer than one global batch of {self.global_batch} "
                f"(batch_size {batch_size} x {world_size} ranks). Lower data.batch_size"
            )
        if not use_mmap:
            allow_open_files(OPEN_WINDOWS * WINDOW_TARS)  # without a mapping every tar of a window stays open
        self.compiled = device == "cpu" if compiled is None else compiled
        self.graph_options: dict[str, Any] = {
            "device": device,
            "device_id": device_id,
            "num_threads": num_threads,
            "prefetch": prefetch,
            "hw_decoder_load": hw_decoder_load,
            "use_mmap": use_mmap,
        }
        self._epoch = self._position = 0
        self._window: Window | None = None
        self._builder: Builder | None = None

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
        while True:
            window = self._window = self._window_at(here)
            if self._builder is None and 2 * window.taken >= len(window.places):
                self._builder = Builder(self, window.following)
            try:
                return window.next()
            except GraphFailed as error:
                # The graph is lost with its batches in flight; the next one begins at this batch, without the bad samples.
                self._window = None
                self._set_aside(window.rows_in_flight(), str(error))

    def _window_at(self, here: tuple[int, int]) -> Window:
        """The window whose next batch begins at `here`: the one in use, the one built ahead, or a new one."""
        if self._window is not None and self._window.here == here:
            return self._window
        self._window = None  # free the old graph before the new one is filled
        builder, self._builder = self._builder, None
        ahead = builder.result() if builder is not None else None
        return ahead if ahead is not None and ahead.here == here else Window(self, *here)

    def _set_aside(self, rows: np.ndarray, dali_says: str) -> None:
        """Quarantine those of the rows that do not decode. ValueError when it is none of them that DALI failed on."""
        unknown = [row for row in np.unique(rows).tolist() if row not in self.quarantine.reasons]
        faults = find_faults(self.index, unknown, self.device)
        if not faults:
            reason = dali_says.split("encountered:")[-1].strip().splitlines()[0]
            raise ValueError(f"{self.index.folder}: DALI failed on one of {len(unknown)} samples: {reason}") from None
        self.quarantine.add(faults)

    def rows_at(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """`[stop - start] int64`: the index rows of the samples that stand at these positions, stand-ins included."""
        return self.quarantine.replace(self.plan.rows(epoch, start, stop), self.seed, epoch, start)

    def places_from(self, epoch: int, position: int) -> Iterator[tuple[int, int]]:
        """Epoch and position of the global batches from there on, without end."""
        while True:
            yield from ((epoch, position + k * self.global_batch) for k in range(self._steps(position)))
            epoch, position = epoch + 1, 0
