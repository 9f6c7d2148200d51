"""The loader: an exact, resumable stream of `CropBatch`, made by DALI."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline import defaults
from pipeline.crops.augment import ViewRecipe
from pipeline.crops.device import DeviceError, as_device_error, choose_crop_device, find_faults
from pipeline.crops.graph import ReaderOptions
from pipeline.dataset import CropBatch, MultiCropDataset, Normalization, default_threads, resolve_device
from pipeline.order import BatchSequence, BatchStart, Plan
from pipeline.quarantine import Quarantine
from pipeline.shards.watch import FolderWatch, allow_open_files
from pipeline.text import Every
from pipeline.window import WINDOW_TARS, GraphFailed, Window, WindowBuilder

if TYPE_CHECKING:
    from pipeline.crops.fused import FusedCrops

log = logging.getLogger(__name__)

WATCH_S = 1.0  # between looks at the shards of a folder
OPEN_WINDOWS = 6  # of a run: one in use and one prefetched, for training and the two splits of the evaluation


class MultiCropLoader:
    """Iterates over the rest of the current epoch: `for crops, labels in loader`. The next iteration is the next epoch.

    `normalization`: crops as float32, normalised by it; None: as uint8, for a model that normalises them itself, a quarter of
    the memory to move. A sample that cannot be decoded goes into `quarantine`, and another one replaces it at its position
    only. Raises ValueError when the quarantine is full.
    """

    batches_left: int | None = None
    """The number of batches that will still be read, over all epochs, if known: graphs then list no further samples. It counts
    down; set it after `load_state_dict`."""

    def __init__(
        self, sequence: BatchSequence, recipes: tuple[ViewRecipe, ...], reader: ReaderOptions,
        normalization: Normalization | None = None, retry_s: float = defaults.STORE_RETRY_S,
    ) -> None:  # fmt: skip
        if reader.device == "gpu" and not torch.cuda.is_available():
            raise DeviceError("device gpu: torch sees no CUDA GPU. Use device cpu, or check the driver with nvidia-smi")
        allow_open_files(OPEN_WINDOWS * WINDOW_TARS)  # every tar of a window stays open
        self.sequence, self.reader, self.normalization = sequence, reader, normalization
        self.index, self.quarantine, self.global_batch = sequence.index, sequence.quarantine, sequence.global_batch
        # The compiled operator normalises a crop while it is in the cache; for an upload that would be four times the bytes.
        self._scaled = normalization is not None and reader.device == reader.crop_device == "cpu"
        scaling = normalization.scaling if normalization is not None and self._scaled else None
        self.watch = FolderWatch([self.index.shard_path(shard) for shard in range(len(self.index.shards))], retry_s)
        self._fused: FusedCrops | None = None
        if reader.crop_device == "gpu":
            from pipeline.crops import fused  # here, because others need no compiler

            self._fused = fused.FusedCrops([recipe.size for recipe in recipes], fused.load_kernel(reader.device_id))
        self._make_window = partial(Window, sequence, recipes, reader, scaling, self._fused, self.watch)
        self._epoch = self._position = 0
        self._window: Window | None = None
        self._builder: WindowBuilder | None = None
        self._watched, self._failed_at = Every(WATCH_S), BatchStart(-1, -1)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self.sequence.steps(0)

    def rows_at(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return `[stop - start] int64`, the index rows of the samples at these positions, with replacements for bad ones."""
        return self.sequence.rows_at(epoch, start, stop)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, unless the loader is already inside it."""
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch begins, `epoch` and the `position` inside it over all ranks, and the index's digest."""
        return {"epoch": self._epoch, "position": self._position, "data": self.index.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a loader of any batch size and world size, over the same shards in any folder.

        Raises ValueError for a state of other shards. A state without `data`, from an old checkpoint, is not checked for that.
        """
        if state.get("data", self.index.digest) != self.index.digest:
            raise ValueError(
                f"{self.index.folder}: its samples differ from those that the state was saved with: the state belongs to "
                "another data set, or the shards were converted again. Continue with the old ones, or start over"
            )
        if not 0 <= state["position"] <= len(self.index):
            raise ValueError(
                f"{self.index.folder}: position {state['position']} lies outside its {len(self.index)} samples: "
                "the state belongs to another data set"
            )
        self._epoch, self._position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[CropBatch]:
        epoch = self._epoch
        for _ in range(self.sequence.steps(self._position)):
            batch = self._next_batch()
            if self.normalization is not None and not self._scaled:
                batch = replace(batch, crops=[self.normalization(crop) for crop in batch.crops])
            # Moved on before the yield: a state saved while the batch is in use names the batch after it.
            self._position += self.global_batch
            if self.batches_left is not None:
                self.batches_left -= 1
            yield batch
        if self._epoch == epoch:
            self._epoch, self._position = epoch + 1, 0

    def _next_batch(self) -> CropBatch:
        here = BatchStart(self._epoch, self._position)
        while True:
            window = self._window = self._window_at(here)
            # Build the next window once half of this one is used, unless this one is the last.
            beyond = None if (left := self._num_left()) is None else left - window.left
            if self._builder is None and 2 * window.taken >= len(window.starts) and (beyond is None or beyond > 0):
                self._builder = WindowBuilder(partial(self._make_window, window.following, beyond))
            if self._watched.due():
                self.watch.patiently(partial(self.watch.check, window.shards[window.taken]))
            try:
                return window.next()
            except GraphFailed as error:
                # The graph is lost with its batches in flight; the next one begins at this batch, without the bad samples.
                rows, message = np.concatenate([rows for rows, _, _ in window.fed]), str(error)
            self._window = None
            del window
            self._set_aside(rows, message)

    def _num_left(self) -> int | None:
        """Return how many batches will be read from here on; None if that is unknown."""
        # An evaluation, in stored order, reads one epoch at a time. Beyond `batches_left`, expect the end of the epoch.
        if not self.sequence.plan.shuffle or (self.batches_left is not None and self.batches_left <= 0):
            return self.sequence.steps(self._position)
        return self.batches_left

    def close(self) -> None:
        """Free the graphs with their threads and device memory. The next batch builds a new one."""
        self._window = None
        if self._fused is not None:
            self._fused.wait()
        self.watch.closing = True  # a window that is being built waits for no tar
        self._take_ahead()
        self.watch.closing = False

    def _window_at(self, here: BatchStart) -> Window:
        """Return the window whose next batch begins at `here`: the one in use, the prefetched one, or a new one."""
        if self._window is not None and self._window.here == here:
            return self._window
        self._window = None  # free the old graph before the new one is filled
        window = self._take_ahead()
        if window is None or window.here != here:
            window = None  # free a prefetched graph of another position before the new one is filled
            window = self._make_window(here, self._num_left())
        return window

    def _take_ahead(self) -> Window | None:
        builder, self._builder = self._builder, None
        if builder is None:
            return None
        builder.join()
        return builder.window

    def _set_aside(self, rows: np.ndarray, dali_error: str) -> None:
        """Quarantine the rows that cannot be decoded.

        Raises DeviceError or torch.OutOfMemoryError if the device failed, StoreError if the storage still does, and ValueError if
        every row can be decoded although the graph has failed here before.
        """
        if error := as_device_error(dali_error, self.reader.numbered(self.reader.device)):
            raise error
        unknown = [row for row in np.unique(rows).tolist() if row not in self.quarantine.reasons]

        def examine() -> dict[int, str]:
            self.watch.check(self.index.samples["shard"][unknown])
            return find_faults(self.index, unknown, self.reader.decoder)

        # Only bytes that were read in full, from a tar that is still the same, can be an image's fault.
        faults = self.watch.patiently(examine)
        here = BatchStart(self._epoch, self._position)
        if not faults and self._failed_at == here:
            reason = dali_error.split("encountered:")[-1].strip().splitlines()[0]
            raise ValueError(f"{self.index.folder}: DALI failed on one of {len(unknown)} samples: {reason}") from None
        self._failed_at = here
        self.quarantine.add(faults)


def build_multicrop_dataloader(
    dataset: MultiCropDataset, batch_size: int = defaults.BATCH_SIZE, *,
    seed: int = 0, rank: int = 0, world_size: int = 1, shuffle: bool = True, drop_last: bool = True, normalized: bool = True,
    quarantine: Path | str | None = None, max_bad_share: float = defaults.MAX_BAD_SHARE,
    device: str = "auto", crop_device: str = "auto", num_workers: int | str = "auto",
    retry_s: float = defaults.STORE_RETRY_S, **options: Any,
) -> MultiCropLoader:  # fmt: skip
    """Build a loader of `CropBatch`: `for crops, labels in loader`.

    `batch_size` is per rank. `normalized`: crops as float32, normalised by the data set's mean and std; False: uint8.
    `quarantine`: the file that remembers samples which cannot be decoded; the first of them makes it, in a folder that must exist
    by then. More bad samples than `max_bad_share` of all are an error. `device`: `gpu`, `cpu`, or `auto` for the GPU if there
    is one. `crop_device`: as in `ReaderOptions`, or `auto` for the best that works, with a warning if it is not the GPU's kernel.
    `num_workers`: DALI's CPU threads, `auto` for half of this process's cores. `retry_s`: the wait for shards that are away.
    `options`: as in `ReaderOptions`.
    """
    index = dataset.index
    device, path = resolve_device(device), Path(quarantine) if quarantine else None
    bad = Quarantine(index, path, max_bad_share)
    sequence = BatchSequence(index, Plan(index.counts, seed, shuffle), bad, batch_size, rank, world_size, drop_last)
    if crop_device == "auto":
        crop_device, sizes = "cpu", tuple(recipe.size for recipe in dataset.recipes)
        if device == "gpu":
            crop_device, reason = choose_crop_device(sizes, options.get("device_id", 0))
            if reason:
                log.warning(reason)
    num_threads = default_threads() if num_workers == "auto" else int(num_workers)
    reader = ReaderOptions(device=device, crop_device=crop_device, num_threads=num_threads, **options)
    normalization = Normalization(dataset.mean, dataset.std) if normalized else None
    return MultiCropLoader(sequence, dataset.recipes, reader, normalization, retry_s)
