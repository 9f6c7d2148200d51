"""Graphs are freed at once, not when the garbage collector happens to run: each holds threads and memory."""

import gc
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from nvidia.dali import Pipeline

from pipeline import build_multicrop_dataloader, build_multicrop_dataset, window
from pipeline.loader import MultiCropLoader
from pipeline.order import BatchStart

WINDOW_BATCHES, BATCH = 3, 8


@pytest.fixture(autouse=True)
def _small_windows_and_no_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(window, "WINDOW_ROWS", WINDOW_BATCHES * BATCH)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def loader_of(data_path: Path, **options: object) -> MultiCropLoader:
    dataset = build_multicrop_dataset("custom", data_path, global_crop_size=32, num_local_crops=0)
    return build_multicrop_dataloader(dataset, BATCH, device="cpu", **{"num_workers": 1, **options})


def graph_of(loader: MultiCropLoader) -> weakref.ref[Pipeline]:
    assert loader._window is not None
    return weakref.ref(loader._window.graph)


def test_of_all_graphs_the_one_in_use_is_alive(data_path: Path) -> None:
    loader, graphs = loader_of(data_path), []
    for _ in range(2):
        for _batch in loader:
            if not graphs or graphs[-1]() is not loader._window.graph:
                graphs.append(graph_of(loader))
            assert [graph() is None for graph in graphs] == [True] * (len(graphs) - 1) + [False]
    assert len(graphs) == 2 * 12 // WINDOW_BATCHES
    loader.close()
    assert [graph() for graph in graphs] == [None] * len(graphs)


def test_a_graph_that_failed_is_freed_before_the_next_is_built(data_path: Path) -> None:
    loader, graphs, alive = loader_of(data_path, max_bad_share=0.1), [], []
    make = loader._make_window

    def make_and_note(start: BatchStart, limit: int | None) -> window.Window:
        if threading.current_thread() is threading.main_thread():  # and not prefetched
            alive.append(sum(graph() is not None for graph in graphs))
        made = make(start, limit)
        graphs.append(weakref.ref(made.graph))
        return made

    loader._make_window = make_and_note
    loader.index.samples["size"][loader.rows_at(0, 30, 34)] = 0
    assert len(list(loader)) == 103 // BATCH
    assert len(loader.quarantine) == 4
    assert alive == [0] * len(alive)
    assert len(alive) >= 2


@pytest.mark.parametrize(
    ("left", "count", "options", "sizes"),
    [
        (1, 1, {}, [1]),
        (7, 7, {}, [3, 3, 1]),
        (2, 5, {}, [2, 3]),  # more than announced
        (None, 12, {}, [3, 3, 3, 3]),
        (None, 13, {"shuffle": False, "drop_last": False}, [3, 3, 3, 3, 1]),  # an evaluation ends with its epoch
    ],
)
def test_no_window_is_planned_beyond_the_batches_that_are_left(
    data_path: Path, left: int | None, count: int, options: dict[str, bool], sizes: list[int]
) -> None:
    loader, planned = loader_of(data_path, **options), list[window.Window]()
    loader.batches_left = left
    for _batch in islice(loader, count):
        if not planned or planned[-1] is not loader._window:
            planned.append(loader._window)
    assert [len(made.starts) for made in planned] == sizes
    assert (loader._builder is None) == (left == count or bool(options))
